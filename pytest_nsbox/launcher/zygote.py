"""The process that inits are forked from: small, so that a fork has little to copy.

The launcher forks it before it imports what it needs itself. It stays in the host's network
namespace, and dies with the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable
from typing import NoReturn

from pytest_nsbox import wire
from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.init.setup import InitPlan, await_plan, run_init
from pytest_nsbox.kernel import libc, namespaces, processes, userns
from pytest_nsbox.kernel.mounts import MountWatch


class Zygote:
    """The launcher's handle on it."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._socket = sock
        self._last: InitPlan | None = None
        self._ahead: socket.socket | None = None  # what tells of the init forked ahead
        self._mounts = MountWatch()
        self._mounted: object = None  # what was on the host when that was asked for

    @classmethod
    def start(cls) -> Zygote:
        """Fork it off the calling process."""
        ours, theirs = wire.pair()
        pid = os.fork()
        if pid == 0:
            try:
                _live(theirs)
            finally:
                os._exit(0)
        theirs.close()
        return cls(pid, ours)

    def fork_init(self, plan: InitPlan, fds: list[int]) -> tuple[int, int]:
        """A new PID 1; returns its pid and a pidfd. `fds` are the sockets to launcher and
        session, then the cgroup.procs files. Raises SetupError."""
        self._last = plan
        message = {"plan": plan.to_wire()}
        if _may_be_ahead(plan) and (found := self._take_ahead(message, fds)) is not None:
            return found
        reply, received = wire.request(self._socket, message, fds)
        return int(reply["pid"]), received[0]

    def may_fork_ahead(self) -> bool:
        """Whether the next init is likely to be one like the last, and is not there yet."""
        return self._last is not None and self._ahead is None and _may_be_ahead(self._last)

    def fork_ahead(self) -> None:
        """Have the next init forked, and in namespaces of its own, before it is asked for. Does
        not wait for it."""
        if self._last is None:
            return
        message = {"plan": self._last.to_wire(), "ahead": True}
        self._last = None
        with contextlib.suppress(OSError):  # said when one is needed
            self._mounted = self._mounts.now()
            ours, theirs = wire.pair()
            with contextlib.ExitStack() as failed, theirs:
                failed.enter_context(ours)
                wire.send(self._socket, message, [theirs.fileno()])
                failed.pop_all()
                self._ahead = ours

    def _take_ahead(self, message: wire.Message, fds: list[int]) -> tuple[int, int] | None:
        """The one forked ahead, now with a plan; None where it will not do."""
        if self._ahead is None:
            return None
        if self._mounted is not self._mounts.now():  # it has another mount namespace's copy
            self._end_ahead()
            return None
        with self._ahead as answer:
            self._ahead = None
            try:
                reply, (pidfd, sock) = wire.reply_of(answer)
            except NsboxError:  # the same will happen again, and be said
                return None
        with socket.socket(fileno=sock) as init:
            try:
                wire.send(init, message, fds)
            except OSError:  # somebody has killed it
                os.close(pidfd)
                return None
        return int(reply["pid"]), pidfd

    def _end_ahead(self) -> None:
        """Without a plan it ends; wait until it has."""
        if self._ahead is None:
            return
        with self._ahead as answer, contextlib.suppress(NsboxError):
            self._ahead = None
            _, fds = wire.reply_of(answer)
            os.close(fds.pop())
            wire.is_ready(fds[0], None)
            wire.close_all(fds)

    def fork_forwarder(self, port: int, fds: list[int], network: str = "") -> int:
        """A process that forwards to a port of the host's loopback; returns a pidfd. `fds` are
        the listening socket and the table of who in `network` may come in. Raises SetupError."""
        message = {"forward": port, "network": network}
        _, received = wire.request(self._socket, message, fds)
        return received[0]

    def close(self) -> None:
        """End it, and wait until it has ended."""
        self._end_ahead()
        self._socket.close()
        os.waitpid(self._pid, 0)


def _may_be_ahead(plan: InitPlan) -> bool:
    """Whether its namespaces are those that nearly every container has."""
    order = plan.order
    return order.own_network and order.uptime is None and not plan.userns


def _live(launcher: socket.socket) -> None:
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    libc.set_process_name("nsbox-zygote")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: wait(2), NOTES
    processes.close_all_but([launcher.fileno()])
    # a collection in a child would write to, and so copy, every page with an object in it
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        received = wire.receive(launcher)
        if received is None:
            return
        message, (answer, *fds) = received
        reply: wire.Message = {}
        out: list[int] = []
        try:
            if "forward" in message:
                pid = _fork_forwarder(int(message["forward"]), str(message["network"]), fds)
            else:
                plan = InitPlan.from_wire(message["plan"])
                plan.prepare()
                if message.get("ahead"):
                    pid, line = _fork_ahead(plan)
                    out.append(line)
                else:
                    pid = _fork(plan, fds)
            reply = {"pid": pid}
            out.insert(0, os.pidfd_open(pid))
        except Exception as error:
            reply = {"error": wire.dump_error(error)}
        finally:
            wire.close_all(fds)
        with socket.socket(fileno=answer) as sock, contextlib.suppress(OSError):
            wire.send(sock, reply, out)
        wire.close_all(out)


def _fork_forwarder(port: int, network: str, fds: list[int]) -> int:
    def forward() -> None:
        from pytest_nsbox.launcher.forwarder import forward_to_loopback  # not for each init

        gc.enable()
        forward_to_loopback(fds[0], port, fds[1] if fds[1:] else None, network)

    return processes.fork_child("nsbox-port", fds, forward)


def _fork_ahead(last: InitPlan) -> tuple[int, int]:
    """An init that has no plan yet, and the socket that it waits for one on."""
    ours, theirs = wire.pair()
    with ours, theirs:
        return _in_new_namespaces(None, lambda: await_plan(theirs, last)), ours.detach()


def _fork(plan: InitPlan, fds: list[int]) -> int:
    if plan.userns:
        return _fork_by_one_between(plan, fds)
    return _in_new_namespaces(plan.order.uptime, lambda: run_init(plan, fds))


def _in_new_namespaces(uptime: float | None, init: Callable[[], NoReturn]) -> int:
    """Fork PID 1; later children of this process are not to be in its namespaces."""
    with contextlib.ExitStack() as stack:
        for kind in ("pid",) if uptime is None else ("pid", "time"):
            own = namespaces.open_namespace(kind)
            stack.callback(os.close, own)
            stack.callback(_return, own, namespaces.FLAGS[kind])
        return _fork_into_new(uptime, init)


def _return(own: int, flag: int) -> None:
    """To the namespace that it forks from. Without that there are no more containers, so what a
    kernel short of memory refuses is tried again."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            return libc.setns(own, flag)
    return libc.setns(own, flag)


def _fork_into_new(uptime: float | None, init: Callable[[], NoReturn]) -> int:
    """Fork the first process of new PID and time namespaces."""
    libc.unshare(libc.CLONE_NEWPID)
    if uptime is not None:
        _set_uptime(uptime)
    pid = os.fork()
    if pid == 0:
        init()
    return pid


def _set_uptime(seconds: float) -> None:
    try:
        libc.unshare(libc.CLONE_NEWTIME)
        namespaces.set_uptime(seconds)
    except OSError as error:
        raise UnsupportedError(
            f"uptime={seconds:g}: the clocks of a time namespace cannot be set here: "
            f"{error.strerror}; it takes CAP_SYS_TIME (in a container: --cap-add SYS_TIME) and "
            "a kernel with time namespaces"
        ) from error


def _fork_by_one_between(plan: InitPlan, fds: list[int]) -> int:
    """The same where the zygote could not return: out of a new user namespace, whose own all the
    others must be, nobody can; to the host's PID namespace only the host's root can.

    So one between makes them, forks PID 1 and ends; the zygote, a subreaper, is then its parent.
    In a user namespace all ids are mapped to themselves: files keep their owners, and root inside
    has no capability outside.
    """
    ours, theirs = wire.pair()
    with ours, theirs:
        between = os.fork()
        if between == 0:
            _between(plan, fds, theirs)
        theirs.close()
        try:
            if plan.order.userns:
                _map_ids(between, ours)
            return int(wire.reply_of(ours)[0]["pid"])
        finally:
            ours.close()
            with contextlib.suppress(ChildProcessError):  # the kernel has reaped it
                os.waitpid(between, 0)


def _map_ids(pid: int, asked: socket.socket) -> None:
    """When it is in its user namespace, give it the ids that there are here."""
    wire.reply_of(asked)
    for kind in ("uid", "gid"):
        with open(f"/proc/{pid}/{kind}_map", "w", encoding="ascii") as file:
            file.write(userns.onto_itself(kind))
    wire.send(asked, {})


def _between(plan: InitPlan, fds: list[int], zygote: socket.socket) -> None:
    try:
        if plan.order.userns:
            libc.unshare(libc.CLONE_NEWUSER)
            wire.send(zygote, {})
            if wire.receive(zygote) is None:
                return
        own = os.pidfd_open(os.getpid())
        pid = _fork_into_new(plan.order.uptime, lambda: run_init(plan, fds, own))
        wire.send(zygote, {"pid": pid})
    except (NsboxError, OSError) as error:
        wire.send(zygote, {"error": wire.dump_error(error)})
    finally:
        os._exit(0)
