"""What there is in the network namespace that the caller is in: read, never written.

One line for each thing, without what changes by itself: counters, lifetimes.
"""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import struct
from collections.abc import Iterator
from pathlib import Path

from pytest_nsbox.kernel.netlink import NETLINK_NETFILTER, Netlink, Request, attributes

_DUMP = 0x300  # NLM_F_ROOT | NLM_F_MATCH
_RTM_GETLINK, _RTM_GETADDR, _RTM_GETROUTE = 18, 22, 26
_NFT_GETTABLE, _NFT_GETCHAIN, _NFT_GETRULE = (10 << 8 | kind for kind in (1, 4, 7))
_IFF_UP = 1
_CLONED = 0x200  # RTM_F_CLONED: an entry of the route cache
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}


def links() -> Iterator[str]:
    """Every link: number, name, hardware address, whether it is up."""
    for body in _dump(_RTM_GETLINK, bytes(16), "ip link"):
        index, flags = struct.unpack_from("=iI", body, 4)  # struct ifinfomsg
        found = attributes(body[16:])
        name = found[3].rstrip(b"\0").decode(errors="replace")  # IFLA_IFNAME
        mac = found.get(1, b"").hex(":")
        yield f"{index} {name} {mac} {'up' if flags & _IFF_UP else 'down'}"


def addresses() -> Iterator[str]:
    """Every address and the number of its link."""
    for body in _dump(_RTM_GETADDR, bytes(8), "ip address"):
        _, prefix, _, _, index = struct.unpack_from("=4BI", body)  # struct ifaddrmsg
        found = attributes(body[8:])
        yield f"{index} {_ip(found.get(_IFA_LOCAL) or found[_IFA_ADDRESS])}/{prefix}"


def routes() -> Iterator[str]:
    """Every route of every table."""
    for body in _dump(_RTM_GETROUTE, bytes(12), "ip route"):
        _, prefix, _, _, table, _, _, kind, flags = struct.unpack_from("=8BI", body)  # struct rtmsg
        if flags & _CLONED:
            continue
        found = attributes(body[12:])  # RTA_DST, RTA_GATEWAY, RTA_OIF, RTA_TABLE
        to = _ip(found[1]) if 1 in found else "default"
        via = f" via {_ip(found[5])}" if 5 in found else ""
        out = struct.unpack("=I", found[4])[0] if 4 in found else 0
        table = struct.unpack("=I", found[15])[0] if 15 in found else table
        yield f"{to}/{prefix}{via} out {out} table {table} type {kind}"


def rules() -> Iterator[str]:
    """Every table, chain and rule of nftables, iptables' among them."""
    kinds = {"table": _NFT_GETTABLE, "chain": _NFT_GETCHAIN, "rule": _NFT_GETRULE}
    for what, kind in kinds.items():
        for body in _dump(kind, bytes(4), f"nft list {what}s", NETLINK_NETFILTER):
            found = attributes(body[4:])  # after struct nfgenmsg; the first is the table's name
            words = [_FAMILIES.get(body[0], str(body[0])), _text(found[1])]
            if what == "chain":
                words.append(_text(found[3]))  # NFTA_CHAIN_NAME
            elif what == "rule":
                words += [_text(found[2]), found[3].hex()]  # NFTA_RULE_CHAIN, NFTA_RULE_HANDLE
            yield " ".join([what, *words])


def forwarding() -> Iterator[str]:
    """The parameters by which this host forwards, each with its value."""
    paths = glob.glob("/proc/sys/net/ipv[46]/conf/*/*forwarding")
    for path in [*paths, "/proc/sys/net/ipv4/ip_forward"]:
        with contextlib.suppress(OSError):  # its device has just gone
            yield f"{path} {Path(path).read_text().strip()}"


def _dump(kind: int, header: bytes, what: str, protocol: int = 0) -> list[bytes]:
    netlink = Netlink(protocol)
    try:
        return netlink.dump(Request(what, kind, _DUMP, header, False))
    finally:
        netlink.close()


def _ip(data: bytes) -> str:
    return str(ipaddress.ip_address(data)) if len(data) in (4, 16) else data.hex()


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
