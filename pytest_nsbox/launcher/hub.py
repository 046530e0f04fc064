"""The private network namespaces that join containers, and the bridges in them."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from dataclasses import dataclass, field

from pytest_nsbox.kernel import libc, link, nft, sysctl
from pytest_nsbox.kernel.namespaces import in_network, open_namespace
from pytest_nsbox.kernel.netlink import Request
from pytest_nsbox.model.addressing import Subnet, mac

UPLINK = "uplink"
_FIRST_INDEX = 10


class Hub:
    """A network namespace of bridges. The constructor leaves the process inside it."""

    def __init__(self, *, internet: bool) -> None:
        self.internet = internet
        self.way_out = False  # until there is an uplink
        self.name_server: str | None = None  # where the uplink stands for the host's
        libc.unshare(libc.CLONE_NEWNET)
        self.netns = open_namespace("net")
        self.netlink = link.LinkSocket()
        self.netlink.send([link.up(link.LOOPBACK, "lo")])
        self._next_index = _FIRST_INDEX
        if internet:
            sysctl.write("/proc/sys/net/ipv4/ip_forward", "1")
        # where br_netfilter is loaded, what one container says to the next would be filtered as
        # if it were routed
        with contextlib.suppress(FileNotFoundError):
            for what in ("iptables", "ip6tables", "arptables"):
                sysctl.write(f"/proc/sys/net/bridge/bridge-nf-call-{what}", "0")
        # a port is an end of a cable: addresses and multicast groups of its own would be some
        # more for each container, and routes that the kernel goes through one by one
        sysctl.write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
        self._reports = _keep_neighbour_reports()

    def next_index(self) -> int:
        """An interface index never used before: links of the dead linger while the kernel
        takes their namespaces down."""
        self._next_index += 1
        return self._next_index

    def close(self) -> None:
        """Let go of the namespace; the kernel takes down what is in it."""
        self.netlink.close()
        self._reports.close()
        os.close(self.netns)


def _keep_neighbour_reports() -> nft.Nft:
    """Forward none of the reports that the kernel of every new container makes, four times, of its
    own addresses. They are for multicast routers, which have no use for groups of one link, but
    a bridge has a copy for each port: with a thousand of them that takes longer than all else."""
    rules, family = nft.Nft(), "bridge"
    with contextlib.suppress(OSError):  # a kernel without: it is slower in a crowd, and that is all
        rules.commit(
            nft.table("nsbox", family),
            nft.chain("nsbox", "reports", "filter", "prerouting", 0, family=family),
            *(
                nft.rule("nsbox", "reports", nft.neighbour_report(n), nft.drop(), family=family)
                for n in (1, 2)  # its address and that of the link may make one group
            ),
        )
    return rules


@dataclass
class Bridge:
    """One network: a bridge whose address is the containers' gateway."""

    id: int
    name: str
    hub: Hub
    subnet: Subnet
    index: int
    mtu: int
    members: dict[int, str] = field(default_factory=dict)  # host number: its line in /etc/hosts
    changes: int = 0  # how often one has come or gone

    @classmethod
    def make(cls, id: int, name: str, hub: Hub, subnet: Subnet, mtu: int) -> Bridge:
        """The caller is in the hub."""
        index = hub.next_index()
        device = f"br{index}"
        hub.netlink.send([link.add_bridge(index, device, mac(subnet.gateway), mtu)])
        for key in ("disable_ipv6", "accept_ra"):  # it asks for no router, either
            sysctl.write(f"/proc/sys/net/ipv6/conf/{device}/{key}", "0")
        hub.netlink.send(
            [
                link.add_address(index, device, subnet.gateway, subnet.ipv4.prefixlen),
                link.add_address(index, device, subnet.gateway6, subnet.ipv6.prefixlen),
            ]
        )
        return cls(id, name, hub, subnet, index, mtu)

    def join(self, container: str) -> Interface:
        """Give out an address. Raises SpecError when there is none left."""
        number = self.subnet.take()
        self.members[number] = f"{self.subnet.ip(number)}\t{container}"
        self.changes += 1
        return Interface(self, number, self.hub.next_index())

    def remove(self) -> None:
        self.hub.netlink.send([link.delete(self.index, f"br{self.index}")])


@dataclass
class Interface:
    """One end of a container on one network."""

    bridge: Bridge
    number: int
    port: int  # index of the veth's end in the hub
    _left: bool = False

    @functools.cached_property
    def ip(self) -> str:
        return self.bridge.subnet.ip(self.number)

    @functools.cached_property
    def ip6(self) -> str:
        return self.bridge.subnet.ip6(self.number)

    def wire(self, device: str, index: int, netns: int | None) -> list[Request]:
        """What joins the container's namespace to the bridge, sent in the hub. `netns` is that
        namespace, None where PID 1 itself sends it."""
        name, address = f"veth{self.port}", mac(self.ip)
        bridge = self.bridge
        return [
            link.add_veth(
                self.port,
                name,
                peer=device,
                peer_index=index,
                peer_netns=netns,
                peer_address=address,
                master=bridge.index,
                mtu=bridge.mtu,
            ),
            link.replace_forwarding(self.port, name, address),
            link.replace_neighbour(bridge.index, self.ip, address),
            link.replace_neighbour(bridge.index, self.ip6, address),
        ]

    def configure(self, device: str, index: int, *, gateway: bool) -> list[Request]:
        """What gives the container's end its addresses, sent inside."""
        subnet = self.bridge.subnet
        requests = [
            link.add_address(index, device, self.ip, subnet.ipv4.prefixlen),
            link.add_address(index, device, self.ip6, subnet.ipv6.prefixlen),
            link.up(index, device),
        ]
        if gateway:
            requests += [
                link.add_default_route(subnet.gateway, index),
                link.add_default_route(subnet.gateway6, index),
            ]
        return requests

    def leave(self) -> None:
        """Give the address back; a second time does nothing."""
        if not self._left:
            self._left = True
            self.bridge.members.pop(self.number, None)
            self.bridge.changes += 1
            self.bridge.subnet.give_back(self.number)


def make_socket(hub: Hub, home: int, family: int, kind: int) -> socket.socket:
    """A socket of the hub's network namespace: it stays there wherever it is used."""
    with in_network(hub.netns, home):
        return socket.socket(family, kind)
