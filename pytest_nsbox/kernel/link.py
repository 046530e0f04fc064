"""Links, addresses, routes and neighbours: rtnetlink(7) messages."""

from __future__ import annotations

import errno
import functools
import ipaddress
import select
import socket
import struct
import time
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from pytest_nsbox.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Netlink,
    Request,
    Template,
    encode,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_NEWROUTE, RTM_GETROUTE, RTM_NEWNEIGH = 20, 24, 26, 28

IFF_UP = 1
IFA_F_NODAD = 0x02
NUD_PERMANENT, NUD_NOARP = 0x80, 0x40
NTF_SELF, NTF_MASTER, NTF_STICKY = 0x02, 0x04, 0x40
IFLA_OPERSTATE, IF_OPER_UP = 16, 6
RTMGRP_LINK, RTMGRP_IPV4_ROUTE = 1, 0x40
_PATIENCE = 5.0  # seconds; the kernel's work queue takes at most one
_MANY = 4096  # messages kept: the same addresses are given out again and again
_INT = struct.Struct("=I")
# not one for each CPU, of which each is a directory in /sys and memory
_ONE_QUEUE = [("IFLA_NUM_TX_QUEUES", 1), ("IFLA_NUM_RX_QUEUES", 1)]
_INIT = 1  # the process that every PID namespace has
LOOPBACK = 1  # the index that lo has in every network namespace


def _link(index: int, up: bool, attrs: list[tuple[str, Any]]) -> Any:
    message = ifinfmsg()
    message["index"] = index
    message["flags"] = message["change"] = IFF_UP if up else 0
    message["attrs"] = attrs
    return message


@functools.lru_cache(_MANY)
def up(index: int, name: str) -> Request:
    """Bring a link up."""
    return Request(f"ip link set {name} up", RTM_NEWLINK, 0, encode(_link(index, True, [])))


def add_bridge(index: int, name: str, address: str, mtu: int) -> Request:
    """A bridge, up, with a MAC address of its own and no waiting before it forwards."""
    attrs = [
        ("IFLA_IFNAME", name),
        ("IFLA_ADDRESS", address),
        ("IFLA_MTU", mtu),
        (
            "IFLA_LINKINFO",
            {
                "attrs": [
                    ("IFLA_INFO_KIND", "bridge"),
                    (
                        "IFLA_INFO_DATA",
                        {"attrs": [("IFLA_BR_FORWARD_DELAY", 0), ("IFLA_BR_MCAST_SNOOPING", 0)]},
                    ),
                ]
            },
        ),
    ]
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Request(
        f"ip link add {name} type bridge", RTM_NEWLINK, flags, encode(_link(index, True, attrs))
    )


def add_veth(
    index: int,
    name: str,
    *,
    peer: str,
    peer_index: int = 0,
    peer_netns: int | None,
    peer_address: str | None = None,
    master: int | None = None,
    mtu: int = 1500,
) -> Request:
    """A veth pair: this end here and up, the peer in another network namespace.

    One message does all of it, so that no half-made pair is ever seen (veth(4)). `peer_netns` is
    a descriptor of the namespace, of the process that sends this; None is where PID 1 of that one's
    PID namespace is.
    """
    netns = _INIT if peer_netns is None else peer_netns
    values = {"index": _INT.pack(index), "name": name.encode(), "netns": _INT.pack(netns)}
    if peer_address is not None:
        values["address"] = _hardware(peer_address)
    by = "IFLA_NET_NS_PID" if peer_netns is None else "IFLA_NET_NS_FD"
    message = _veth(len(name), peer, peer_index, by, peer_address is not None, master, mtu)
    return Request(
        f"ip link add {name} type veth peer name {peer}",
        RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        message.fill(**values),
    )


def _hardware(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))


@functools.lru_cache(_MANY)
def _veth(
    length: int, peer: str, peer_index: int, by: str, addressed: bool, master: int | None, mtu: int
) -> Template:
    index, netns, address, name = 0x7E57AB1E, 0x7E57F00D, "7e:57:00:ad:d4:e5", "?" * length
    marks = {"index": _INT.pack(index), "name": name.encode(), "netns": _INT.pack(netns)}
    peer_attrs: list[tuple[str, Any]] = [
        ("IFLA_IFNAME", peer),
        (by, netns),
        ("IFLA_MTU", mtu),
        *_ONE_QUEUE,
    ]
    if addressed:
        peer_attrs.append(("IFLA_ADDRESS", address))
        marks["address"] = _hardware(address)
    attrs: list[tuple[str, Any]] = [
        ("IFLA_IFNAME", name),
        ("IFLA_MTU", mtu),
        *_ONE_QUEUE,
        (
            "IFLA_LINKINFO",
            {
                "attrs": [
                    ("IFLA_INFO_KIND", "veth"),
                    (
                        "IFLA_INFO_DATA",
                        {"attrs": [("VETH_INFO_PEER", {"index": peer_index, "attrs": peer_attrs})]},
                    ),
                ]
            },
        ),
    ]
    if master is not None:
        attrs.append(("IFLA_MASTER", master))
    return Template(encode(_link(index, True, attrs)), **marks)


def delete(index: int, name: str) -> Request:
    """Remove a link."""
    return Request(f"ip link del {name}", RTM_DELLINK, 0, encode(_link(index, False, [])))


@functools.lru_cache(_MANY)
def add_address(index: int, name: str, address: str, prefix: int) -> Request:
    """An address on a link, usable at once: no duplicate address detection for IPv6."""
    ip = ipaddress.ip_address(address)
    message = ifaddrmsg()
    message["family"] = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    message["prefixlen"] = prefix
    message["index"] = index
    message["attrs"] = [("IFA_ADDRESS", address), ("IFA_LOCAL", address)]
    if ip.version == 4:
        net = ipaddress.IPv4Interface(f"{address}/{prefix}").network
        if prefix < 31:
            message["attrs"].append(("IFA_BROADCAST", str(net.broadcast_address)))
    else:
        message["flags"] = IFA_F_NODAD
        message["attrs"].append(("IFA_FLAGS", IFA_F_NODAD))
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Request(
        f"ip addr add {address}/{prefix} dev {name}", RTM_NEWADDR, flags, encode(message)
    )


@functools.lru_cache(_MANY)
def add_default_route(gateway: str, index: int) -> Request:
    """The default route through `gateway`."""
    version = ipaddress.ip_address(gateway).version
    message = rtmsg()
    message["family"] = socket.AF_INET if version == 4 else socket.AF_INET6
    message["table"] = 254  # RT_TABLE_MAIN
    message["proto"] = 3  # RTPROT_BOOT, as ip-route(8) has it
    message["type"] = 1  # RTN_UNICAST
    message["attrs"] = [("RTA_GATEWAY", gateway), ("RTA_OIF", index)]
    return Request(
        f"ip route add default via {gateway}",
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_EXCL,
        encode(message),
    )


def _neighbour(family: int, index: int, flags: int, attrs: list[tuple[str, Any]]) -> bytes:
    message = ndmsg()
    message["family"] = family
    message["ifindex"] = index
    message["state"] = NUD_PERMANENT if family != socket.AF_BRIDGE else NUD_NOARP
    message["flags"] = flags
    message["attrs"] = attrs
    return encode(message)


@functools.lru_cache(_MANY)
def replace_neighbour(index: int, ip: str, mac: str) -> Request:
    """Where `ip` is, known without asking (arp(7))."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    return Request(
        f"ip neigh replace {ip} lladdr {mac}",
        RTM_NEWNEIGH,
        NLM_F_CREATE | NLM_F_REPLACE,
        _neighbour(family, index, 0, [("NDA_DST", ip), ("NDA_LLADDR", mac)]),
    )


def replace_forwarding(index: int, name: str, mac: str) -> Request:
    """The bridge's port for `mac`.

    An address is given out again while the kernel still takes the last owner's veth down; what
    the bridge learned from that one would swallow the first packets to the new one. Sticky, or it
    would learn it again: who is being taken down still answers, and a static entry moves.
    """
    return Request(
        f"bridge fdb replace {mac} dev {name} master static sticky",
        RTM_NEWNEIGH,
        NLM_F_CREATE | NLM_F_REPLACE,
        _forwarding().fill(index=_INT.pack(index), mac=_hardware(mac)),
    )


@functools.cache
def _forwarding() -> Template:
    index, mac = 0x7E57AB1E, "7e:57:00:ad:d4:e5"
    encoded = _neighbour(socket.AF_BRIDGE, index, NTF_MASTER | NTF_STICKY, [("NDA_LLADDR", mac)])
    return Template(encoded, index=_INT.pack(index), mac=_hardware(mac))


def index_of(netlink: Netlink, name: str) -> int:
    """The index of the link with this name. Raises OSError (ENODEV)."""
    message = _link(0, False, [("IFLA_IFNAME", name)])
    body = netlink.get(Request(f"ip link show {name}", RTM_GETLINK, 0, encode(message), False))
    return int(struct.unpack_from("=i", body, 4)[0])  # struct ifinfomsg


class LinkSocket(Netlink):
    """A netlink socket for links, which can wait until one is ready."""

    def settle(self, index: int) -> None:
        """Wait until a link that has its carrier sends and receives.

        The kernel notices a carrier in a work queue (link watch): until it has, a veth drops what
        it is given, and a bridge keeps its port shut. Asking for the link makes it look (since
        6.8); before that, its notification is waited for. Raises OSError (ETIMEDOUT).
        """
        message = _shown().fill(index=_INT.pack(index))
        request = Request(f"ip link show {index}", RTM_GETLINK, 0, message, False)
        if _operational(self.get(request)):
            return
        watch = Netlink(groups=RTMGRP_LINK, timeout=_PATIENCE)
        try:
            while not _operational(self.get(request)):
                watch.wait()
        finally:
            watch.close()


@functools.cache
def _shown() -> Template:
    return Template(encode(_link(0x7E57AB1E, False, [])), index=_INT.pack(0x7E57AB1E))


class RouteWatch:
    """Notices a default route that another process makes in this network namespace."""

    def __init__(self, patience: float) -> None:
        self._netlink = Netlink(groups=RTMGRP_LINK | RTMGRP_IPV4_ROUTE)
        self._patience = patience

    def wait_for_way_out(self, netlink: Netlink, maker: int) -> None:
        """Wait for it. Raises OSError when `maker`, a pidfd, ends before or it takes too long."""
        poll = select.poll()
        poll.register(self._netlink.fileno(), select.POLLIN)
        poll.register(maker, select.POLLIN)
        deadline = time.monotonic() + self._patience
        while default_route_device(netlink) is None:
            ready = {fd for fd, _ in poll.poll(max(deadline - time.monotonic(), 0) * 1000)}
            if maker in ready:
                raise OSError(errno.ECHILD, "it has ended at once")
            if not ready:
                raise OSError(errno.ETIMEDOUT, f"no route in {self._patience:.0f} s")
            self._netlink.wait()

    def close(self) -> None:
        self._netlink.close()


def _operational(body: bytes) -> bool:
    return _attribute(body, 16, IFLA_OPERSTATE, "=B") == IF_OPER_UP


def default_route_device(netlink: Netlink) -> int | None:
    """The index of the device that packets to the outside leave by, or None."""
    return route_device(netlink, "192.88.99.1")  # any address that only a default route covers


def route_device(netlink: Netlink, address: str) -> int | None:
    """The index of the device that packets to `address` leave by, or None."""
    message = rtmsg()
    message["family"] = socket.AF_INET
    message["dst_len"] = 32
    message["attrs"] = [("RTA_DST", address)]
    request = Request(f"ip route get {address}", RTM_GETROUTE, 0, encode(message), False)
    try:
        body = netlink.get(request)
    except OSError:
        return None
    return _attribute(body, 12, 4, "=I")  # after struct rtmsg, RTA_OIF


def _attribute(body: bytes, offset: int, kind: int, layout: str) -> int | None:
    """The value of an attribute in what follows the fixed header of a message."""
    while offset + 4 <= len(body):
        length, found = struct.unpack_from("=HH", body, offset)
        if length < 4:
            break
        if found == kind:
            return int(struct.unpack_from(layout, body, offset + 4)[0])
        offset += length + -length % 4
    return None
