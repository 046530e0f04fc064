"""The way out: one veth pair from the hub to the host, and one masqueraded address.

The host keeps its sysctls but for one per device, which is put back: to forward packets that
come in by the uplink, and the answers that come in by the device of the default route.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from contextlib import AbstractContextManager

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel import link, nft, sysctl
from pytest_nsbox.kernel.namespaces import in_network, open_namespace
from pytest_nsbox.kernel.netlink import Netlink
from pytest_nsbox.launcher.hub import UPLINK, Hub
from pytest_nsbox.launcher.ledger import Ledger
from pytest_nsbox.launcher.tunnel import masquerade_in_hub
from pytest_nsbox.launcher.undo import Undo

# shared address space (RFC 6598), a /30 per session: no home or office network uses it
_TRANSIT = ipaddress.IPv4Network("100.64.0.0/10")
_SIOCGIFNAME, _SIOCGIFMTU = 0x8910, 0x8921


class Host:
    """The host's network namespace, as the launcher finds it before it leaves."""

    def __init__(self) -> None:
        self.netns = open_namespace("net")
        self.netlink = Netlink()
        self._ioctl = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.home = self.netns  # the namespace that the launcher returns to

    def entered(self) -> AbstractContextManager[None]:
        """Be in it for a while."""
        return in_network(self.netns, self.home)

    def name_of(self, index: int) -> str:
        request = struct.pack("16si20x", b"", index)
        answer = fcntl.ioctl(self._ioctl, _SIOCGIFNAME, request)
        return answer[:16].rstrip(b"\0").decode()

    def mtu(self) -> int:
        """The MTU of the way out, 1500 where there is none."""
        index = link.default_route_device(self.netlink)
        if index is None:
            return 1500
        request = struct.pack("16si20x", self.name_of(index).encode(), 0)
        answer = fcntl.ioctl(self._ioctl, _SIOCGIFMTU, request)
        return min(max(int(struct.unpack_from("16si", answer)[1]), 1280), 65535)


class Uplink:
    """A hub's way out, for as long as the session lives."""

    def __init__(self, host: Host, hub: Hub, ledger: Ledger) -> None:
        self._undo = Undo()
        self.address = ""  # the hub's
        try:
            self._make(host, hub, ledger)
        except OSError as error:
            self._undo.run()
            raise UnsupportedError(
                f"no way out for containers: {error}; "
                "use network='isolated', or --nsbox-uplink=none for all tests"
            ) from error

    def _make(self, host: Host, hub: Hub, ledger: Ledger) -> None:
        # whose it is, for `nsbox gc --check`; two processes of containers that share the host's
        # network may have the same number
        name = f"nsbox{os.getpid()}-{os.urandom(1).hex()}"
        host.netlink.send(
            [
                link.add_veth(
                    0,
                    name,
                    peer=UPLINK,
                    peer_netns=hub.netns,
                    mtu=host.mtu(),
                )
            ]
        )
        index = link.index_of(host.netlink, name)
        self._undo.push(
            f"ip link del {name}", lambda: host.netlink.send([link.delete(index, name)])
        )
        # the kernel heeds a wish for the peer's index only beside one for this end's (veth_newlink)
        in_hub = link.index_of(hub.netlink, UPLINK)
        ours, theirs = _free_addresses(host, index)
        self.address = theirs
        host.netlink.send([link.add_address(index, name, ours, 30)])
        hub.netlink.send(
            [
                link.add_address(in_hub, UPLINK, theirs, 30),
                link.up(in_hub, UPLINK),
                link.add_default_route(ours, in_hub),
            ]
        )
        self._masquerade_in_hub()
        self._masquerade_on_host(host, name, theirs)
        self._forward(host, name, ledger)

    def _masquerade_in_hub(self) -> None:
        rules = nft.Nft()
        self._undo.push("nft delete table ip nsbox", rules.close)
        rules.commit(*masquerade_in_hub())

    def _masquerade_on_host(self, host: Host, name: str, address: str) -> None:
        with host.entered():
            rules = nft.Nft()
        self._undo.push(f"nft delete table ip {name}", rules.close)
        rules.commit(
            nft.table(name),
            nft.chain(name, "postrouting", "nat", "postrouting", nft.PRIORITY_SRCNAT),
            nft.rule(name, "postrouting", nft.source(address), nft.masquerade()),
        )

    def _forward(self, host: Host, name: str, ledger: Ledger) -> None:
        conf = "/proc/sys/net/ipv4/conf"
        with host.entered():  # on a device of our own, gone with us
            sysctl.write(f"{conf}/{name}/forwarding", "1")
            with contextlib.suppress(FileNotFoundError):
                sysctl.write(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")
        out = link.default_route_device(host.netlink)
        if out is None:
            return
        self._undo.push("put sysctls back", lambda: ledger.put_back_sysctls(host.entered))
        ledger.set_sysctl(f"{conf}/{host.name_of(out)}/forwarding", "1", host.entered)

    def close(self) -> None:
        self._undo.run()


def _free_addresses(host: Host, index: int) -> tuple[str, str]:
    """Two addresses that the host has no route of its own to.

    An interface index is unique on the host, so that two sessions at once do not meet.
    """
    default = link.default_route_device(host.netlink)
    blocks = _TRANSIT.num_addresses // 4
    for attempt in range(64):
        start = int(_TRANSIT.network_address) + 4 * ((index + attempt * 4099) % blocks)
        ours, theirs = str(ipaddress.IPv4Address(start + 1)), str(ipaddress.IPv4Address(start + 2))
        if link.route_device(host.netlink, theirs) == default:
            return ours, theirs
    raise OSError(98, f"every address tried in {_TRANSIT} is already routed on this host")
