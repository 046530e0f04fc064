"""The process that inits are forked from: small, so that a fork has little to copy.

The launcher forks it before it imports what it needs itself. It stays in the host's network
namespace, and dies with the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
from collections.abc import Iterable

from pytest_nsbox import wire
from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.init.setup import InitPlan, run_init
from pytest_nsbox.kernel import libc, namespaces, userns


class Zygote:
    """The launcher's handle on it."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._socket = sock

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
        reply, received = wire.request(self._socket, {"plan": plan.to_wire()}, fds)
        return int(reply["pid"]), received[0]

    def fork_forwarder(self, port: int, fds: list[int], network: str = "") -> int:
        """A process that forwards to a port of the host's loopback; returns a pidfd. `fds` are
        the listening socket and the table of who in `network` may come in. Raises SetupError."""
        message = {"forward": port, "network": network}
        _, received = wire.request(self._socket, message, fds)
        return received[0]

    def close(self) -> None:
        """End it, and wait until it has ended."""
        self._socket.close()
        os.waitpid(self._pid, 0)


def _live(launcher: socket.socket) -> None:
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    libc.set_process_name("nsbox-zygote")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: wait(2), NOTES
    close_all_but([launcher.fileno()])
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
        pidfds: list[int] = []
        try:
            if "forward" in message:
                pid = _fork_forwarder(int(message["forward"]), str(message["network"]), fds)
            else:
                plan = InitPlan.from_wire(message["plan"])
                plan.prepare()
                pid = _fork(plan, fds)
            reply = {"pid": pid}
            pidfds = [os.pidfd_open(pid)]
        except Exception as error:
            reply = {"error": wire.dump_error(error)}
        finally:
            wire.close_all(fds)
        with socket.socket(fileno=answer) as sock, contextlib.suppress(OSError):
            wire.send(sock, reply, pidfds)
        wire.close_all(pidfds)


def _fork_forwarder(port: int, network: str, fds: list[int]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
            libc.set_process_name("nsbox-port")
            close_all_but(fds)
            from pytest_nsbox.launcher.forwarder import forward_to_loopback  # not for each init

            gc.enable()
            forward_to_loopback(fds[0], port, fds[1] if fds[1:] else None, network)
        finally:
            os._exit(1)
    return pid


def close_all_but(keep: Iterable[int]) -> None:
    """Close what belongs to the parent, so that its sockets close when it does."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _fork(plan: InitPlan, fds: list[int]) -> int:
    if plan.userns:
        return _fork_by_one_between(plan, fds)
    with contextlib.ExitStack() as stack:
        # later children are not to be in the new ones
        for kind in ("pid",) if plan.order.uptime is None else ("pid", "time"):
            own = namespaces.open_namespace(kind)
            stack.callback(os.close, own)
            stack.callback(libc.setns, own, namespaces.FLAGS[kind])
        return _fork_into_new(plan, fds)


def _fork_into_new(plan: InitPlan, fds: list[int]) -> int:
    """Fork the first process of new PID and time namespaces."""
    libc.unshare(libc.CLONE_NEWPID)
    if plan.order.uptime is not None:
        _set_uptime(plan.order.uptime)
    pid = os.fork()
    if pid == 0:
        run_init(plan, fds)
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
        wire.send(zygote, {"pid": _fork_into_new(plan, fds)})
    except (NsboxError, OSError) as error:
        wire.send(zygote, {"error": wire.dump_error(error)})
    finally:
        os._exit(0)
