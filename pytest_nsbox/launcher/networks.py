"""The networks of a session: the hubs that bridges are in, and the default ones."""

from __future__ import annotations

from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.namespaces import in_network
from pytest_nsbox.launcher.hub import Bridge, Hub
from pytest_nsbox.launcher.undo import Undo
from pytest_nsbox.launcher.uplink import Host
from pytest_nsbox.launcher.wayout import WayOut
from pytest_nsbox.launcher.wiring import Joiner
from pytest_nsbox.model.addressing import Subnet
from pytest_nsbox.model.order import Order


class Networks:
    """The constructor leaves the process in the hub of those that reach the outside: the launcher
    lives there."""

    def __init__(self, host: Host, undo: Undo, subnet: str) -> None:
        self.way_out: WayOut | None = None
        self._host = host
        self._undo = undo
        self._subnet = subnet  # of the default ones
        self._hubs: dict[bool, Hub] = {}
        self._defaults: dict[bool, Bridge] = {}
        self._bridges: dict[int, Bridge] = {}
        self._last_id = 0
        self.hub(True)

    def hub(self, internet: bool) -> Hub:
        """The network namespace of those with, or those without, a way out."""
        if internet not in self._hubs:
            hub = Hub(internet=internet)
            self._hubs[internet] = hub
            self._undo.push("close hub", hub.close)
            if internet:
                self._host.home = hub.netns
            else:
                libc.setns(self._hubs[True].netns, libc.CLONE_NEWNET)
        return self._hubs[internet]

    def make(self, name: str, subnet: Subnet, internet: bool) -> Bridge:
        hub = self.hub(internet)
        if internet and self.way_out is not None:
            self.way_out.open(hub)
        self._last_id += 1
        with in_network(hub.netns, self._hubs[True].netns):
            bridge = Bridge.make(self._last_id, name, hub, subnet, self._host.mtu())
        self._bridges[bridge.id] = bridge
        return bridge

    def remove(self, id: int) -> None:
        """Remove a network; missing is fine."""
        bridge = self._bridges.pop(id, None)
        if bridge is not None:
            bridge.remove()

    def joiners(self, order: Order) -> list[Joiner]:
        """For each network of a container what gives it an address there."""

        def joiner(bridge: Bridge) -> Joiner:
            return lambda: bridge.join(order.name)

        return [joiner(bridge) for bridge in self._of(order)]

    def _of(self, order: Order) -> list[Bridge]:
        if order.networks:
            return [self._bridges[id] for id in order.networks]
        if order.network not in ("nat", "isolated"):
            return []
        internet = order.network == "nat"
        if internet not in self._defaults:
            self._defaults[internet] = self.make("default", Subnet(self._subnet), internet)
        return [self._defaults[internet]]
