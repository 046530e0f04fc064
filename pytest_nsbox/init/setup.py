"""From a fork of the zygote to the container's PID 1."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from pytest_nsbox import wire
from pytest_nsbox.init.confine import confinement
from pytest_nsbox.init.serve import serve
from pytest_nsbox.init.tree import OwnFile, file_tree, places, prepare_tree
from pytest_nsbox.kernel import libc, mounts, sysctl
from pytest_nsbox.kernel.namespaces import open_namespace
from pytest_nsbox.kernel.netlink import Netlink
from pytest_nsbox.kernel.processes import close_all_but
from pytest_nsbox.model.order import Order

NAME = "nsbox-init"


@dataclass(frozen=True, kw_only=True)
class InitPlan:
    """All that init has to know but for the container's name and addresses: plain data."""

    order: Order
    userns: bool  # whether mounts are made in a user namespace, the container's or one above
    layer: str | None  # the directory on disk for what is written; None: memory
    cover: str | None  # rootless: the directory to lay over the host's root
    cgroups: tuple[str, ...] | None  # mount options of v1 hierarchies; empty on v2

    def to_wire(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["order"] = self.order.to_wire()
        return data

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> InitPlan:
        data = dict(data)
        data["order"] = Order.from_wire(data["order"])
        if data["cgroups"] is not None:
            data["cgroups"] = tuple(data["cgroups"])
        return cls(**data)

    def prepare(self) -> None:
        """Do before the fork what is the same for the next container."""
        prepare_tree(self.cgroups)
        if not self.order.privileged:
            confinement(frozenset(self.order.capabilities)).prepare()


def run_init(plan: InitPlan, fds: list[int], between: int | None = None) -> NoReturn:
    """Be PID 1 until the end. `fds` are the sockets to launcher and session, and the
    cgroup.procs files to join by; `between` is the pidfd of a parent that is about to end, and
    leaves this process to the zygote."""
    keep = fds if between is None else [*fds, between]
    _leave_the_zygote(keep, NAME, die_with_parent=between is None)
    _live(plan, fds, lambda: _isolate(plan.order.own_network), between)


def await_plan(zygote: socket.socket, last: InitPlan) -> NoReturn:
    """The same for who has been forked ahead of the plan: in namespaces of its own by then."""
    prepared: list[OSError | Own] = []

    def isolated() -> Own:
        (found,) = prepared
        if isinstance(found, OSError):
            raise found
        return found

    try:
        _leave_the_zygote([zygote.fileno()], "nsbox-ahead", die_with_parent=True)
        try:
            prepared.append(_isolate(own_network=True))
            _rehearse(last)
        except OSError as error:
            prepared[:] = [error]
        received = wire.receive(zygote)
        if received is not None:
            zygote.close()
            libc.set_process_name(NAME)
            _live(InitPlan.from_wire(received[0]["plan"]), received[1], isolated)
    finally:
        os._exit(1)


def _rehearse(plan: InitPlan) -> None:
    """Go through what is to come, but for what it does: the pages that it writes to are then
    this process's own, and not copied when there is somebody who waits (fork(2))."""
    again = InitPlan.from_wire(json.loads(json.dumps(plan.to_wire())))
    for step in _file_tree(again):
        step.describe()


def _live(
    plan: InitPlan, fds: list[int], isolate: Callable[[], Own], between: int | None = None
) -> NoReturn:
    status = 1
    launcher, session = (socket.socket(fileno=fd) for fd in fds[:2])
    try:
        _build(plan, launcher, isolate(), fds[2:], between)
        serve(launcher, session)
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            wire.send(launcher, {"error": wire.dump_error(error)})
    finally:
        os._exit(status)


def _leave_the_zygote(keep: list[int], name: str, *, die_with_parent: bool) -> None:
    if die_with_parent:
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.set_process_name(name)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    close_all_but(keep)
    os.setsid()
    os.umask(0o022)


@dataclass
class Own:
    """What the launcher gives a name and addresses to from outside, while mounts are made here:
    descriptors of namespaces, and a socket in the network's."""

    namespaces: list[int]
    netlink: Netlink | None = None

    def hand_out(self, launcher: socket.socket) -> None:
        fds = [] if self.netlink is None else [self.netlink.fileno()]
        wire.send(launcher, {"op": "apart"}, self.namespaces + fds)
        wire.close_all(self.namespaces)
        if self.netlink is not None:
            self.netlink.close()


def _isolate(own_network: bool) -> Own:
    flags = libc.CLONE_NEWNS | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS
    libc.unshare(flags | (libc.CLONE_NEWNET if own_network else 0))
    if not own_network:
        return Own([open_namespace("uts")])
    _ask_nobody()
    return Own([open_namespace("uts"), open_namespace("net")], Netlink())


def _ask_nobody() -> None:
    """No interface is to ask who else has its addresses, which have been given out and can be used
    at once, nor for routers: all its neighbours would be asked."""
    for name in ("accept_dad", "router_solicitations"):
        with contextlib.suppress(OSError):  # it is slower in a crowd, and that is all
            sysctl.write_directly(f"/proc/sys/net/ipv6/conf/default/{name}", "0")


def _file_tree(plan: InitPlan) -> list[mounts.Step]:
    userns = plan.userns
    return file_tree(plan.order, plan.layer, plan.cgroups, in_userns=userns, cover=plan.cover)


def _build(
    plan: InitPlan,
    launcher: socket.socket,
    own: Own,
    cgroup_procs: list[int],
    between: int | None,
) -> None:
    order = plan.order
    own.hand_out(launcher)
    _join(cgroup_procs)
    steps = _file_tree(plan)
    mounts.run(steps[:-1])
    # the one way to what the container writes, for the launcher: from inside there is none
    scratch = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    own_files = {step.name: step.open() for step in steps if isinstance(step, OwnFile)}
    mounts.run(steps[-1:])
    if not order.privileged:
        confinement(frozenset(order.capabilities)).apply()
    if between is not None:  # or its end would be this process's, too
        select.select([between], [], [])
        os.close(between)
    # again, since a change of credentials clears it; the zygote is the parent by now
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    rows = [place.to_wire() for place in places(steps, plan.layer, plan.order)]
    fds = [scratch, *own_files.values()]
    wire.send(launcher, {"op": "ready", "places": rows, "files": list(own_files)}, fds)
    wire.close_all(fds)


def _join(cgroup_procs: list[int]) -> None:
    for fd in cgroup_procs:
        os.write(fd, b"0")
        os.close(fd)
    # after joining: what a cgroup namespace shows as its root is the group of who unshares
    libc.unshare(libc.CLONE_NEWCGROUP)
