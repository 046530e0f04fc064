"""The way out of an ordinary user, and of root where the host does not forward: a program on the
host that is the other end of a tap device in the hub, and speaks TCP, UDP and ICMP for it by
sockets of its own (pasta(1), slirp4netns(1))."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.kernel import link, nft
from pytest_nsbox.kernel.netlink import Request
from pytest_nsbox.launcher.envoy import Envoy
from pytest_nsbox.launcher.hub import UPLINK, Hub
from pytest_nsbox.launcher.undo import Undo

INSTALL = "install pasta (Debian, Ubuntu: apt install passt) or slirp4netns"
INSTALL_FOR_ROOT = "install slirp4netns (Debian, Ubuntu: apt install slirp4netns)"
_PATIENCE = 30.0  # seconds until a program that does not set its device up is an error

# of the shared address space (RFC 6598): the addresses are the hub's own, so two sessions may
# have the same
_NETWORK, _GATEWAY, _ADDRESS = "100.64.0.0/24", "100.64.0.2", "100.64.0.100"
NAME_SERVER = "100.64.0.3"  # stands for the host's own, wherever that is


def _pasta(namespaces: str, mtu: int, rootless: bool) -> list[str]:
    # nothing of the host's loopback in, nothing of the hub's out
    closed = ["-t", "none", "-u", "none", "-T", "none", "-U", "none", "--no-map-gw"]
    ours = ["--ipv4-only", "-a", _ADDRESS, "-n", "24", "-g", _GATEWAY, "-m", str(mtu)]
    names = ["--dns-forward", NAME_SERVER, "--ns-ifname", UPLINK]
    where = ["--userns", f"{namespaces}/user", "--netns", f"{namespaces}/net"]
    return ["pasta", "--foreground", "--quiet", "--config-net", *ours, *closed, *names, *where]


def _slirp4netns(namespaces: str, mtu: int, rootless: bool) -> list[str]:
    closed = ["--disable-host-loopback", f"--cidr={_NETWORK}", f"--mtu={mtu}"]
    where = [f"--userns-path={namespaces}/user"] if rootless else []
    where += ["--netns-type=path", f"{namespaces}/net", UPLINK]
    return ["slirp4netns", "--configure", *closed, *where]


PROGRAMS: dict[str, Callable[[str, int, bool], list[str]]] = {
    "pasta": _pasta,
    "slirp4netns": _slirp4netns,
}
FOR_ROOT = ("slirp4netns",)  # pasta gives up root's capabilities before it enters a namespace


@dataclass(frozen=True)
class Choice:
    """The programs that may be the uplink, the best first, or why there is none."""

    programs: tuple[str, ...] = ()
    why_not: str = ""

    def describe(self) -> str:
        return self.why_not or f"uplink {self.programs[0] if self.programs else 'none'}"


def choose(wanted: str, rootless: bool) -> Choice:
    """What `--nsbox-uplink` comes to where it is a program.

    Raises UnsupportedError for one asked for by name that cannot be.
    """
    if wanted == "none":
        return Choice()
    if rootless and wanted == "veth":
        raise UnsupportedError(
            "--nsbox-uplink=veth: only root may put a device into the host's network; "
            f"use auto, and {INSTALL}"
        )
    fit = tuple(PROGRAMS) if rootless else FOR_ROOT
    if wanted not in ("auto", *fit):
        raise UnsupportedError(
            f"--nsbox-uplink={wanted} is for ordinary users; root has 'veth', "
            f"{FOR_ROOT[0]!r} and 'none'"
        )
    install = INSTALL if rootless else INSTALL_FOR_ROOT
    found = [name for name in fit if wanted in ("auto", name) and shutil.which(name)]
    why = ""
    if not found:
        why = install if wanted == "auto" else f"there is no program {wanted}; {install}"
    elif not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        why = "/dev/net/tun is not there or not to be opened; sudo chmod 666 /dev/net/tun"
    if not why:
        return Choice(tuple(found))
    if wanted != "auto":
        raise UnsupportedError(f"--nsbox-uplink={wanted}: {why}")
    return Choice(why_not=f"no way out of containers: {why}")


class Tunnel:
    """A hub's way out, for as long as the session lives. The caller is in the hub."""

    def __init__(self, program: str, envoy: Envoy, hub: Hub, mtu: int, rootless: bool) -> None:
        self._undo = Undo()
        try:
            watch = link.RouteWatch(_PATIENCE)
            command = PROGRAMS[program](f"/proc/{os.getpid()}/ns", mtu, rootless)
            pidfd = envoy.keep(command)
            self._undo.push("close the pidfd of the uplink", lambda: os.close(pidfd))
            try:
                watch.wait_for_way_out(hub.netlink, pidfd)
            finally:
                watch.close()
            masquerade = nft.Nft()
            self._undo.push("nft delete table ip nsbox", masquerade.close)
            masquerade.commit(*masquerade_in_hub())
        except (OSError, NsboxError) as error:
            self._undo.run()
            raise UnsupportedError(
                f"no way out for containers: {program}: {error}; "
                "use network='isolated', or --nsbox-uplink=none for all tests"
            ) from error

    def close(self) -> None:
        self._undo.run()


def masquerade_in_hub() -> list[Request]:
    """Containers share the uplink's address; one network cannot reach another through the hub."""
    return [
        nft.table("nsbox"),
        nft.chain("nsbox", "postrouting", "nat", "postrouting", nft.PRIORITY_SRCNAT),
        nft.rule("nsbox", "postrouting", nft.interface(nft.OIFNAME, UPLINK), nft.masquerade()),
        nft.chain("nsbox", "forward", "filter", "forward", nft.PRIORITY_FILTER, nft.DROP),
        nft.rule("nsbox", "forward", nft.interface(nft.OIFNAME, UPLINK), nft.accept()),
        nft.rule("nsbox", "forward", nft.interface(nft.IIFNAME, UPLINK), nft.accept()),
    ]
