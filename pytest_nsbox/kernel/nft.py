"""nftables over netlink: the few tables, chains and rules that are needed here (nft(8)).

A table carries the owner flag: no other process can change it, and the kernel removes it when
the socket that made it closes.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import nft_chain_msg, nft_rule_msg, nft_table_msg
from pyroute2.nftables.expressions import genex, masq, verdict

from pytest_nsbox.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    Request,
    attributes,
    encode,
)

_SUBSYS = 10 << 8  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _NEWCHAIN, _NEWRULE = _SUBSYS | 0, _SUBSYS | 3, _SUBSYS | 6
_GETCHAIN, _GETRULE = _SUBSYS | 4, _SUBSYS | 7
_APPEND = 0x800
_DUMP = 0x300
_TABLE_OWNER = 2  # NFT_TABLE_F_OWNER
_FAMILIES = {"ip": socket.AF_INET, "bridge": 7}  # NFPROTO_BRIDGE
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "postrouting": 4}
ACCEPT, DROP = 1, 0
PRIORITY_FILTER, PRIORITY_SRCNAT = 0, 100

IIFNAME, OIFNAME = 6, 7  # NFT_META_IIFNAME, NFT_META_OIFNAME
_LINK_HEADER, _NETWORK_HEADER, _TRANSPORT_HEADER = 0, 1, 2
_MLD2_REPORT = 143
_REPORTS_GO_TO = bytes.fromhex("333300000016")  # ff02::16
_SOLICITED_NODE = socket.inet_pton(socket.AF_INET6, "ff02::1:ff00:0")[:13]


def _message(kind: type[Any], attrs: list[tuple[str, Any]], family: str = "ip") -> bytes:
    message = kind()
    message["nfgen_family"] = _FAMILIES[family]
    message["attrs"] = attrs
    return encode(message)


def table(name: str, family: str = "ip") -> Request:
    """A table that lives as long as the socket it is sent on."""
    attrs = [("NFTA_TABLE_NAME", name), ("NFTA_TABLE_FLAGS", _TABLE_OWNER)]
    payload = _message(nft_table_msg, attrs, family)
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Request(f"nft add table {family} {name} {{ flags owner; }}", _NEWTABLE, flags, payload)


def chain(
    table_: str,
    name: str,
    kind: str,
    hook: str,
    priority: int,
    policy: int = ACCEPT,
    family: str = "ip",
) -> Request:
    """A base chain at a hook."""
    attrs = [
        ("NFTA_CHAIN_TABLE", table_),
        ("NFTA_CHAIN_NAME", name),
        (
            "NFTA_CHAIN_HOOK",
            {
                "attrs": [
                    ("NFTA_HOOK_HOOKNUM", _HOOKS[hook]),
                    ("NFTA_HOOK_PRIORITY", priority),
                ]
            },
        ),
        ("NFTA_CHAIN_POLICY", policy),
        ("NFTA_CHAIN_TYPE", kind),
    ]
    what = f"nft add chain {family} {table_} {name} {{ type {kind} hook {hook}; }}"
    payload = _message(nft_chain_msg, attrs, family)
    return Request(what, _NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, payload)


def rule(table_: str, chain_: str, *expressions: list[Any], family: str = "ip") -> Request:
    """A rule at the end of a chain."""
    attrs = [
        ("NFTA_RULE_TABLE", table_),
        ("NFTA_RULE_CHAIN", chain_),
        ("NFTA_RULE_EXPRESSIONS", [expr for group in expressions for expr in group]),
    ]
    what = f"nft add rule {family} {table_} {chain_}"
    payload = _message(nft_rule_msg, attrs, family)
    return Request(what, _NEWRULE, NLM_F_CREATE | _APPEND, payload)


def _compare(data: bytes, op: int = 0) -> Any:
    return genex("cmp", {"sreg": 1, "op": op, "data": {"attrs": [("NFTA_DATA_VALUE", data)]}})


def interface(key: int, name: str) -> list[Any]:
    """Match the name of the interface a packet came in or goes out by."""
    return [
        genex("meta", {"key": key, "dreg": 1}),
        _compare(name.encode().ljust(16, b"\0")),
    ]


def source(address: str) -> list[Any]:
    """Match the one address a packet comes from."""
    return _field(_NETWORK_HEADER, 12, socket.inet_aton(address))


def destination(address: str) -> list[Any]:
    """Match the one address a packet goes to."""
    return _field(_NETWORK_HEADER, 16, socket.inet_aton(address))


def neighbour_report(count: int) -> list[Any]:
    """Match a multicast listener report (RFC 3810, 5.2) about `count` solicited-node addresses
    and nothing else: what a host says of the addresses that it can be asked for by."""
    records = [
        expression
        for number in range(count)
        for expression in _field(_TRANSPORT_HEADER, 12 + 20 * number, _SOLICITED_NODE)
    ]
    return [
        *_field(_LINK_HEADER, 0, _REPORTS_GO_TO),  # first, since no other frame passes it
        *_field(_TRANSPORT_HEADER, 0, bytes([_MLD2_REPORT])),
        *_field(_TRANSPORT_HEADER, 6, struct.pack("!H", count)),
        *records,
    ]


def _field(base: int, offset: int, data: bytes) -> list[Any]:
    """Match what a header has at an offset."""
    return [
        genex("payload", {"dreg": 1, "base": base, "offset": offset, "len": len(data)}),
        _compare(data),
    ]


def drop() -> list[Any]:
    return list(verdict(DROP))


def counted_drop() -> list[Any]:
    """Count the packet, and drop it."""
    return [genex("counter", {"bytes": 0, "packets": 0}), *verdict(DROP)]


def masquerade() -> list[Any]:
    """Give leaving packets the address of the interface they leave by."""
    return list(masq())


def accept() -> list[Any]:
    return list(verdict(ACCEPT))


def forward_chains() -> list[tuple[str, int]]:
    """The base chains at the forward hook here, iptables' among them: name and policy.

    Needs CAP_NET_ADMIN; raises OSError.
    """
    header = struct.pack("=BBH", socket.AF_INET, 0, 0)
    request = Request("nft list chains", _GETCHAIN, _DUMP, header, False)
    netlink = Netlink(NETLINK_NETFILTER)
    try:
        bodies = netlink.dump(request)
    finally:
        netlink.close()
    found = []
    for body in bodies:
        attrs = attributes(body[4:])  # after struct nfgenmsg
        if 4 in attrs and struct.unpack_from(">I", attributes(attrs[4])[1])[0] == 2:
            name = b"/".join(attrs[key].rstrip(b"\0") for key in (1, 3)).decode()
            found.append((name, struct.unpack(">I", attrs.get(5, b"\0\0\0\1"))[0]))
    return found


def _elements(data: bytes) -> list[bytes]:
    """A nested list, whose attributes are all of one kind."""
    found = []
    offset = 0
    while offset + 4 <= len(data):
        length = struct.unpack_from("=H", data, offset)[0]
        if length < 4:
            break
        found.append(data[offset + 4 : offset + length])
        offset += length + -length % 4
    return found


class Nft:
    """A socket whose tables live as long as it does."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)

    def close(self) -> None:
        self._netlink.close()

    def commit(self, *requests: Request) -> None:
        """All of `requests`, or none (a netlink batch). Raises OSError for the first refused."""
        header = struct.pack("=BBH", socket.AF_UNSPEC, 0, socket.htons(10))
        begin = Request("nft batch begin", _BATCH_BEGIN, 0, header, False)
        end = Request("nft batch end", _BATCH_END, 0, header, False)
        self._netlink.send([begin, *requests, end])

    def packets(self, table_: str, chain_: str) -> int:
        """How many the counters in a chain have seen."""
        attrs = [("NFTA_RULE_TABLE", table_), ("NFTA_RULE_CHAIN", chain_)]
        payload = _message(nft_rule_msg, attrs)
        count = 0
        for body in self._netlink.dump(Request("nft list rules", _GETRULE, _DUMP, payload, False)):
            for element in _elements(attributes(body[4:]).get(4, b"")):
                expression = attributes(element)  # NFTA_EXPR_NAME, NFTA_EXPR_DATA
                if expression[1] == b"counter\0":
                    count += struct.unpack(">Q", attributes(expression[2])[2])[0]
        return count


__all__ = [
    "IIFNAME",
    "OIFNAME",
    "Nft",
    "accept",
    "chain",
    "counted_drop",
    "destination",
    "drop",
    "forward_chains",
    "interface",
    "masquerade",
    "neighbour_report",
    "nfgen_msg",
    "rule",
    "source",
    "table",
]
