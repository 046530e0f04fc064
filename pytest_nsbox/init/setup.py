"""From a fork of the launcher to the container's PID 1."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_nsbox import wire
from pytest_nsbox.init.confine import Confinement
from pytest_nsbox.init.serve import serve
from pytest_nsbox.kernel import libc, mounts
from pytest_nsbox.kernel.namespaces import open_namespace
from pytest_nsbox.kernel.netlink import Netlink, Request


@dataclass(frozen=True)
class InitPlan:
    """What init does, in the order in which it does it."""

    hostname: str
    namespaces: int  # CLONE_NEW* flags left to unshare; the PID namespace is its own already
    cgroup_procs: Sequence[int]  # open cgroup.procs files to join by
    own_network: bool
    netns: int | None  # else the namespace to be in
    own_parent: bool  # the parent is not the launcher yet, but one that is about to end
    steps: Sequence[mounts.Step]
    network: Sequence[Request]  # for inside, once the launcher has put the interfaces there
    confinement: Confinement | None


def run_init(plan: InitPlan, launcher: socket.socket, session: socket.socket) -> None:
    """Be PID 1 until the end. Runs in the forked child and never returns."""
    status = 1
    try:
        keep = [launcher.fileno(), session.fileno(), *plan.cgroup_procs]
        _forget_the_launcher(keep if plan.netns is None else [*keep, plan.netns])
        if not plan.own_parent:
            libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
        _build(plan, launcher)
        serve(launcher, session)
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            wire.send(launcher, {"error": wire.dump_error(error)})
    finally:
        os._exit(status)


def _forget_the_launcher(keep: list[int]) -> None:
    """Close what belongs to the launcher, so that its sockets close when it does."""
    libc.set_process_name("nsbox-init")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _build(plan: InitPlan, launcher: socket.socket) -> None:
    os.setsid()
    os.umask(0o022)
    libc.unshare(plan.namespaces & ~libc.CLONE_NEWCGROUP)
    if plan.netns is not None:
        libc.setns(plan.netns, libc.CLONE_NEWNET)
        os.close(plan.netns)
    if plan.own_network:
        fd = open_namespace("net")
        wire.send(launcher, {"op": "netns"}, [fd])
        os.close(fd)
    for fd in plan.cgroup_procs:
        os.write(fd, b"0")
        os.close(fd)
    # after joining: what a cgroup namespace shows as its root is the group of who unshares
    libc.unshare(plan.namespaces & libc.CLONE_NEWCGROUP)
    libc.sethostname(plan.hostname)
    mounts.run(plan.steps)
    if wire.receive(launcher) is None:
        raise OSError(104, "the launcher has ended")
    if plan.own_network:
        netlink = Netlink()
        netlink.send(plan.network)
        netlink.close()
    if plan.confinement is not None:
        plan.confinement.apply()
    # again, since a change of credentials clears it; the launcher is the parent by now
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    wire.send(launcher, {"op": "ready"})
