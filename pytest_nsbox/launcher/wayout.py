"""Which way out containers have: a veth pair where we are root and the host forwards packets for
us, else a program that needs no forwarding, else none, and then it is said why."""

from __future__ import annotations

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.launcher import forwarding, tunnel
from pytest_nsbox.launcher.envoy import Envoy
from pytest_nsbox.launcher.hub import Hub
from pytest_nsbox.launcher.ledger import Ledger
from pytest_nsbox.launcher.standing import Standing
from pytest_nsbox.launcher.tunnel import Choice, Tunnel
from pytest_nsbox.launcher.undo import Undo
from pytest_nsbox.launcher.uplink import Host, Uplink


class WayOut:
    """Of one hub, opened when a first network is to have it."""

    def __init__(self, host: Host, standing: Standing, ledger: Ledger, wanted: str) -> None:
        self._host = host
        self._standing = standing
        self._ledger = ledger
        self._wanted = wanted  # --nsbox-uplink
        self._undo = Undo()
        self._opened = wanted == "none"
        self._choice: Choice | None = None  # of programs; root has one where it needs it

    def open(self, hub: Hub) -> None:
        """Give the hub its way out, once. Raises UnsupportedError where one was asked for by name
        and cannot be had."""
        if self._opened:
            return
        if not self._standing.rootless and self._wanted in ("auto", "veth"):
            self._open_veth(hub)
        if not hub.way_out and self._wanted != "veth":
            self._open_tunnel(hub)
        self._opened = True

    def _open_veth(self, hub: Hub) -> None:
        uplink = Uplink(self._host, hub, self._ledger)
        try:
            why = forwarding.refusal(self._host, uplink.address)
        except BaseException:
            uplink.close()
            raise
        if why is None:
            self._undo.push("close the uplink", uplink.close)
            hub.way_out = True
            return
        uplink.close()
        if self._wanted == "veth":
            raise UnsupportedError(f"--nsbox-uplink=veth: {why}; {forwarding.CURE}")
        self._choice = tunnel.choose("auto", rootless=False)
        if self._choice.why_not:
            cure = f"{tunnel.INSTALL_FOR_ROOT}, or {forwarding.CURE}"
            self._choice = Choice(why_not=f"no way out of containers: {why}; {cure}")

    def _open_tunnel(self, hub: Hub) -> None:
        """The first that works; where none was asked for by name, also none: then `describe` says
        why, and what stays inside works."""
        rootless = self._standing.rootless
        choice = self._choice or tunnel.choose(self._wanted, rootless)
        while choice.programs:
            try:
                program, mtu = choice.programs[0], self._host.mtu()
                found = Tunnel(program, self._envoy(), hub, mtu, rootless)
            except UnsupportedError as error:
                if self._wanted != "auto":
                    raise
                choice = Choice(choice.programs[1:], str(error))
            else:
                self._undo.push("close the uplink", found.close)
                hub.way_out, hub.name_server = True, tunnel.NAME_SERVER
                break
        self._choice = choice

    def _envoy(self) -> Envoy:
        """Who starts the program on the host; root may be there itself, and fork it."""
        if self._standing.envoy is not None:
            return self._standing.envoy
        with self._host.entered():
            envoy = Envoy.start()
        self._undo.push("end the envoy", envoy.close)
        return envoy

    def describe(self) -> str:
        """For the report header; empty for what is to be expected."""
        if self._choice is None and self._standing.rootless:
            try:
                self._choice = tunnel.choose(self._wanted, rootless=True)
            except UnsupportedError:
                return ""
        return self._choice.describe() if self._choice is not None else ""

    def close(self) -> None:
        self._undo.run()
