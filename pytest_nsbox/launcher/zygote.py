"""The launcher's handle on the process that inits are forked from. It is forked before the launcher
imports what it needs itself, so that it is small, and a fork of it has little to copy."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_nsbox import wire
from pytest_nsbox.errors import ContainerDied, NsboxError, SetupError
from pytest_nsbox.init.setup import Kind
from pytest_nsbox.kernel import mounts
from pytest_nsbox.kernel.mountinfo import MountWatch
from pytest_nsbox.kernel.namespaces import Home
from pytest_nsbox.launcher.forks import live

# the namespaces that the launcher goes to: before the foundation is laid, and after that
VISITED, VISITED_AGAIN = ("mnt", "ipc", "uts", "net"), ("mnt", "uts")


class InitFailed(Exception):
    """What an init has said before it ended; its argument is as `wire.dump_error` has it."""


@dataclass
class Init:
    """One that has been forked."""

    pid: int
    pidfd: int
    line: socket.socket  # the launcher's to it
    root: int = -1  # where it is visited, once that is known
    foundation: object = None  # that has been laid for its file tree

    def close(self) -> None:
        self.line.close()
        wire.close_all([self.pidfd, self.root])


@dataclass
class _Ahead:
    """One that is being forked before it is asked for."""

    kind: Kind
    line: socket.socket
    mounted: object  # what was on the host when it was asked for: it has a copy of that
    init: Init | None = None  # once the zygote has been listened to


class Zygote:
    """It answers what it is asked in the order that it is asked in."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._socket = sock
        self._last: Kind | None = None
        self._ahead: _Ahead | None = None
        self._mounts = MountWatch()
        self.watch = select.epoll()  # has something to say when the one forked ahead has

    @classmethod
    def start(cls) -> Zygote:
        """Fork it off the calling process."""
        ours, theirs = wire.pair()
        pid = os.fork()
        if pid == 0:
            try:
                live(theirs)
            finally:
                os._exit(0)
        theirs.close()
        return cls(pid, ours)

    def fork_init(self, kind: Kind, foundation: object) -> Init:
        """A new PID 1 that will be isolated, say so, and wait for its order; if it has been forked
        ahead the `foundation` may have been laid. Raises SetupError, or InitFailed."""
        self._last = kind
        if (init := self._take_ahead(kind, foundation)) is not None:
            return init
        line, theirs = wire.pair()
        with contextlib.ExitStack() as failed:
            failed.enter_context(line)  # an error that is kept would keep it open
            try:
                with theirs:
                    self._ask({"kind": kind.to_wire()}, [theirs.fileno()])
                pid, pidfd = self._told()
            except SetupError:
                word = last_word(line)  # it may have failed before it could be got hold of
                if word is not None:
                    raise InitFailed(word) from None
                raise
            except ContainerDied:
                raise SetupError("the process that inits are forked from has ended") from None
            failed.pop_all()
        return Init(pid, pidfd, line)

    def _ask(self, message: wire.Message, fds: list[int]) -> None:
        try:
            wire.send(self._socket, message, fds)
        except (BrokenPipeError, ConnectionResetError):
            raise ContainerDied(f"cannot fork: {wire.ENDED}") from None

    def _told(self) -> tuple[int, int]:
        """The pid and the pidfd of what it has forked. Raises an NsboxError."""
        reply, (pidfd,) = wire.reply_of(self._socket)
        return int(reply["pid"]), pidfd

    def may_fork_ahead(self) -> bool:
        """Whether the next init is likely to be one like the last, and is not there yet."""
        last = self._last
        # one with clocks of its own would have begun to count
        return self._ahead is None and last is not None and last.uptime is None

    def fork_ahead(self, *, visited: bool) -> None:
        """Have the next init forked, and in namespaces of its own, before it is asked for. Does
        not wait for it: where it can be `visited`, it can be watched for that."""
        if self._last is None:
            return
        kind, self._last = self._last, None
        with contextlib.suppress(OSError, ContainerDied):  # it is said when one is needed
            mounted = self._mounts.now()
            line, theirs = wire.pair()
            with theirs, contextlib.ExitStack() as failed:
                failed.enter_context(line)
                self._ask({"kind": kind.to_wire()}, [theirs.fileno()])
                failed.pop_all()
            self._ahead = _Ahead(kind, line, mounted)
            if visited and not kind.in_userns:
                self.watch.register(line, select.EPOLLIN)

    def ahead(self) -> Init | None:
        """The one forked ahead; None where there is none, or it could not be forked: the same will
        happen again, and be said."""
        ahead = self._ahead
        if ahead is not None and ahead.init is None:
            try:
                ahead.init = Init(*self._told(), ahead.line)
            except (NsboxError, OSError, ValueError):  # or no descriptor was left for its pidfd
                self._ahead = None
                self._unwatch(ahead.line)
                ahead.line.close()
                return None
        return None if ahead is None else ahead.init

    def lay_foundation(self, steps: Sequence[mounts.Step], home: Home) -> None:
        """Prepare the one forked ahead, which has just said that it is isolated, for its file
        tree."""
        init = self.ahead()
        if init is None:
            return
        try:
            init.root = apart_by(wire.receive(init.line))["root"]
            with home.away(dict.fromkeys(VISITED, init.pidfd), init.root):
                root = mounts.begin(steps)
            os.close(init.root)
            init.root, init.foundation = root, steps
        except (OSError, ValueError, LookupError):  # what is wrong is said when one is needed
            self.end_ahead()

    def _take_ahead(self, kind: Kind, foundation: object) -> Init | None:
        """The one forked ahead; None where it will not do."""
        ahead, init = self._ahead, self.ahead()
        if ahead is None or init is None:
            return None
        same = ahead.kind == kind and init.foundation in (None, foundation)
        if not same or ahead.mounted is not self._mounts.now() or wire.is_ready(init.pidfd, 0):
            self.end_ahead()
            return None
        self._ahead = None
        self._unwatch(init.line)
        return init

    def end_ahead(self) -> None:
        """Without an order it ends; wait until it has."""
        init, self._ahead = self.ahead(), None
        if init is not None:
            self._unwatch(init.line)
            init.line.close()
            wire.is_ready(init.pidfd, None)
            init.close()

    def _unwatch(self, line: socket.socket) -> None:
        # closing it is not enough while a fork of this process has it, too (epoll(7))
        with contextlib.suppress(FileNotFoundError):
            self.watch.unregister(line)

    def fork_forwarder(self, port: int, fds: list[int], network: str = "") -> int:
        """A process that forwards to a port of the host's loopback; returns a pidfd. `fds` are
        the listening socket and the table of who in `network` may come in. Raises SetupError."""
        self.end_ahead()  # whose answer would come first
        self._ask({"forward": port, "network": network}, fds)
        return self._told()[1]

    def close(self) -> None:
        """End it, and wait until it has ended."""
        self.end_ahead()
        self._socket.close()
        self.watch.close()
        os.waitpid(self._pid, 0)


def apart_by(received: tuple[wire.Message, list[int]] | None) -> dict[str, int]:
    """What an init that is isolated hands out of its namespaces, by what it is. Raises
    LookupError."""
    message, fds = received or ({}, [])
    return dict(zip(message["of"], fds, strict=True))


def last_word(line: socket.socket) -> wire.Message | None:
    """The error that one has ended with; None where it has said none."""
    with contextlib.suppress(BlockingIOError, ValueError):
        while received := wire.receive(line, flags=socket.MSG_DONTWAIT):
            message, fds = received
            wire.close_all(fds)
            if "error" in message:
                return dict(message["error"])
    return None
