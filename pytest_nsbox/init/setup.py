"""From a fork of the zygote to the container's PID 1."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import socket
from dataclasses import dataclass
from typing import Any, NoReturn

from pytest_nsbox import wire
from pytest_nsbox.init.confine import confinement
from pytest_nsbox.init.serve import serve
from pytest_nsbox.init.tree import file_tree, places, prepare_tree
from pytest_nsbox.kernel import libc, mounts
from pytest_nsbox.kernel.namespaces import open_namespace
from pytest_nsbox.kernel.netlink import Netlink, Request
from pytest_nsbox.model.order import Order


@dataclass(frozen=True, kw_only=True)
class InitPlan:
    """All that init has to know: plain data."""

    order: Order
    userns: bool  # whether mounts are made in a user namespace, the container's or one above
    layer: str | None  # the directory on disk for what is written; None: memory
    cover: str | None  # rootless: the directory to lay over the host's root
    resolv_conf: str
    hosts: str
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


def run_init(plan: InitPlan, fds: list[int]) -> NoReturn:
    """Be PID 1 until the end. `fds` are the sockets to launcher and session, and the
    cgroup.procs files to join by."""
    status = 1
    launcher, session = (socket.socket(fileno=fd) for fd in fds[:2])
    try:
        _leave_the_zygote(plan, fds)
        _build(plan, launcher, fds[2:])
        serve(launcher, session)
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            wire.send(launcher, {"error": wire.dump_error(error)})
    finally:
        os._exit(status)


def _leave_the_zygote(plan: InitPlan, keep: list[int]) -> None:
    if not plan.userns:  # there the parent is one that is about to end
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.set_process_name("nsbox-init")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    os.setsid()
    os.umask(0o022)


def _build(plan: InitPlan, launcher: socket.socket, cgroup_procs: list[int]) -> None:
    order = plan.order
    flags = libc.CLONE_NEWNS | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS
    libc.unshare(flags | (libc.CLONE_NEWNET if order.own_network else 0))
    if order.own_network:
        fd = open_namespace("net")
        wire.send(launcher, {"op": "netns"}, [fd])
        os.close(fd)
    for fd in cgroup_procs:
        os.write(fd, b"0")
        os.close(fd)
    # after joining: what a cgroup namespace shows as its root is the group of who unshares
    libc.unshare(libc.CLONE_NEWCGROUP)
    libc.sethostname(order.hostname)
    steps = file_tree(
        order,
        plan.layer,
        plan.resolv_conf,
        plan.hosts,
        plan.cgroups,
        in_userns=plan.userns,
        cover=plan.cover,
    )
    mounts.run(steps[:-1])
    # the one way to what the container writes, for the launcher: from inside there is none
    scratch = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mounts.run(steps[-1:])
    wired = wire.receive(launcher)
    if wired is None:
        raise OSError(104, "the launcher has ended")
    if order.own_network:
        netlink = Netlink()
        netlink.send(Request.from_wire(row) for row in wired[0]["network"])
        netlink.close()
    if not order.privileged:
        confinement(frozenset(order.capabilities)).apply()
    # again, since a change of credentials clears it; the zygote is the parent by now
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    rows = [place.to_wire() for place in places(steps, plan.layer, plan.order)]
    wire.send(launcher, {"op": "ready", "places": rows}, [scratch])
    os.close(scratch)
