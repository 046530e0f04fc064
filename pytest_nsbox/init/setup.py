"""From a fork of the zygote to the container's PID 1.

A page of memory is shared with the zygote, and with all other inits, until one of them writes to
it, and to count the references to an object is to write. So an init, and the zygote from one to the
next, go by few functions and objects: with a thousand of them that is what a container takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import select
import signal
from _socket import socket as Socket
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from pytest_nsbox import wire
from pytest_nsbox.init.confine import Confinement, confinement
from pytest_nsbox.init.serve import serve
from pytest_nsbox.kernel import libc, mounts, sysctl
from pytest_nsbox.kernel.namespaces import open_namespace
from pytest_nsbox.kernel.netlink import open_socket
from pytest_nsbox.kernel.processes import close_all_but

NAME = "nsbox-init"
_SIGKILL = int(signal.SIGKILL)
_HIGHEST = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
_HANDED = ("uts", "net")
# by whether it is in a user namespace
_APART = {
    True: wire.encode({"op": "apart", "of": _HANDED}),
    False: wire.encode({"op": "apart", "of": ["root"]}),
}
_QUESTIONS = [
    f"/proc/sys/net/ipv6/conf/default/{name}" for name in ("accept_dad", "router_solicitations")
]
BATCH = b"N"  # begins what is no message to init, but several to the kernel (netlink(7))
_BUILT = wire.encode({})  # an order that leaves nothing to do
READY = wire.encode({"op": "ready"})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What an init has to be told before it is forked; all else can wait until it is isolated."""

    network: bool  # it has a network namespace of its own
    uptime: float | None
    own_userns: bool
    in_userns: bool  # its own, or one above
    capabilities: tuple[str, ...] | None  # those kept; None: all, and every system call

    def to_wire(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Kind:
        kept = data["capabilities"]
        kind = cls(**{**data, "capabilities": None if kept is None else tuple(kept)})
        if kind.confinement is not None:  # before the first fork
            kind.confinement.prepare()
        return kind

    @cached_property
    def confinement(self) -> Confinement | None:
        """What its commands may not do."""
        return None if self.capabilities is None else confinement(frozenset(self.capabilities))


def run_init(launcher: Socket, kind: Kind, between: int | None = None) -> NoReturn:
    """Be PID 1 until the end: isolate oneself and say so, connect oneself with networks, wait for
    the order, be ready and say so, serve. With the order come the session's socket and the
    cgroup.procs files to join by, and the steps to the file tree, unless somebody else takes them.

    `between` is the pidfd of a parent that is about to end, and leaves this process to the zygote.
    """
    status = 1
    try:
        own = launcher.fileno()
        if between is None:
            libc.prctl(libc.PR_SET_PDEATHSIG, _SIGKILL)
            # as below, with fewer functions and objects
            os.closerange(3, own)
            os.closerange(own + 1, _HIGHEST)
        else:
            close_all_but([own, between])
        libc.set_process_name("nsbox-ahead")
        os.setsid()
        isolate(kind, launcher)
        fds: list[int] = []
        received = connect(launcher, fds)
        if received is not None:
            order, (session, *cgroup_procs) = received
            libc.set_process_name(NAME)
            join(cgroup_procs)
            if order != _BUILT:
                fds.append(_build(order))
            confine(kind, between)
            wire.send_bytes(launcher, READY, fds)
            wire.close_all(fds)
            serve(launcher, Socket(fileno=session))
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            wire.send(launcher, {"error": wire.dump_error(error)})
    finally:
        os._exit(status)


def isolate(kind: Kind, launcher: Socket) -> None:
    """Be in namespaces of one's own, and hand out what the launcher needs to visit them: in a user
    namespace descriptors of those of its name and its network, as its pidfd is of no use there
    (ptrace(2), access mode checking), else its root in that of mounts."""
    flags = libc.CLONE_NEWNS | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS
    libc.unshare(flags | (libc.CLONE_NEWNET if kind.network else 0))
    fds = [open_namespace(name) for name in _HANDED] if kind.in_userns else []
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
    # it is of the PID namespace of who mounts it, and that is what nobody can visit
    libc.mount("proc", "/proc", "proc", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)
    if kind.network:
        _ask_nobody()
    if not kind.in_userns:
        fds.append(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    wire.send_bytes(launcher, _APART[kind.in_userns], fds)
    wire.close_all(fds)


def _ask_nobody() -> None:
    """No interface is to ask who else has its addresses, which have been given out and can be used
    at once, nor for routers: all its neighbours would be asked. This is for a /proc of one's own:
    in the host's the kernel looks through the entries of all network namespaces."""
    for path in _QUESTIONS:
        try:
            sysctl.write_directly(path, "0")
        except OSError:  # it is slower in a crowd, and that is all
            continue


def connect(launcher: Socket, opened: list[int]) -> tuple[bytes, list[int]] | None:
    """Send the kernel what comes before the order: by the netlink socket that comes with it, or by
    one in this network namespace. Whoever has these reads what the kernel says to it."""
    while (received := wire.receive_bytes(launcher)) is not None:
        payload, fds = received
        if payload[:1] != BATCH:
            return received
        if not fds:
            opened.append(open_socket().detach())
        os.write(fds[0] if fds else opened[0], payload[1:])
        wire.close_all(fds)
    return None


def _build(order: bytes) -> int:
    return mounts.build(mounts.from_wire(wire.decode(order)["steps"]))


def join(cgroup_procs: list[int]) -> None:
    for fd in cgroup_procs:
        os.write(fd, b"0")
        os.close(fd)
    # after joining: what a cgroup namespace shows as its root is the group of who unshares
    libc.unshare(libc.CLONE_NEWCGROUP)


def confine(kind: Kind, between: int | None) -> None:
    if kind.confinement is not None:
        kind.confinement.apply()
    if between is not None:  # or its end would be this process's, too
        select.select([between], [], [])
        os.close(between)
    # again, since a change of credentials clears it; the zygote is the parent by now
    libc.prctl(libc.PR_SET_PDEATHSIG, _SIGKILL)
