"""Python functions that run inside a container: a fork of this process enters it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pytest_nsbox import wire
from pytest_nsbox.errors import CallError, ContainerDied, NsboxError
from pytest_nsbox.session.surroundings import working_directory

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container

_LENGTH = struct.Struct("=Q")
_CHUNK = 1 << 16  # what is larger, malloc(3) maps and unmaps each time
_UNTIL_DEAD = 5.0  # seconds that a killed process has to end in
PATIENCE = 0.2  # seconds by which a killed container's process may seem to die before it


Talk = Callable[[bytes], bytes]
"""Sends a message out and returns the answer: while one of the two is at work the other waits, so
what both write to a terminal stays in order."""


class Inside:
    """A forked child at work in a container, running `body`, and what it has to say."""

    def __init__(
        self, container: Container, body: Callable[[Talk], None], cwd: str | None = None
    ) -> None:
        from pytest_nsbox.init.enter import Ticket, fork_into

        try:
            reply, fds = container.way_in()
        except ContainerDied as error:
            raise (container.death() or error) from None
        kept = reply["capabilities"]
        ticket = Ticket(
            pidfd=fds[0],
            cgroup_procs=fds[1:],
            own_network=reply["network"],
            own_time=reply["time"],
            own_user=reply["user"],
            rootless=reply["rootless"],
            capabilities=None if kept is None else frozenset(kept),
            libraries={} if container.brought is None else container.brought.libraries,
        )
        self._buffer = bytearray()
        self._socket, theirs = socket.socketpair()

        def child() -> int:
            self._socket.close()
            body(functools.partial(_talk, theirs))
            _flush()
            return 0

        _flush()  # or the child would write it once more
        try:
            with theirs, _logs_at_rest():
                self.pid = fork_into(ticket, child, cwd)
        except BaseException as error:
            self._socket.close()
            if isinstance(error, ProcessLookupError):  # it has died since the way in was opened
                raise container.why_dead() from None
            raise
        finally:
            ticket.close()
        self.pidfd = os.pidfd_open(self.pid)
        self._container = container
        container.bodies.append(self)

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The child's next message; None at its end. It waits for `reply`.

        Raises TimeoutError when that takes longer than `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self.pidfd, select.POLLIN)
        buffer = self._buffer
        while True:
            if len(buffer) >= _LENGTH.size:
                end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
                if len(buffer) >= end:
                    data = bytes(buffer[_LENGTH.size : end])
                    del buffer[:end]
                    return data
            left = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
            ready = {fd for fd, _ in poll.poll(left)}
            if not ready:
                raise TimeoutError
            # a grandchild may hold the socket open, so the child's end ends it, too
            chunk = self._socket.recv(_CHUNK) if self._socket.fileno() in ready else b""
            if not chunk:
                return None
            buffer += chunk

    def reply(self, data: bytes = b"") -> None:
        """Answer the child's last message."""
        with contextlib.suppress(OSError):
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def end(self) -> int:
        """Wait for the child; its exit code, negative for the signal that killed it."""
        self._container.bodies.remove(self)
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            status = 0  # SIGCHLD is ignored here, so the kernel has kept none (wait(2), NOTES)
        os.close(self.pidfd)
        self._socket.close()
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """SIGKILL, and wait for its end; one that does not end is given up after a while, and its
        container's teardown says who it is."""
        self.signal(signal.SIGKILL)
        if not self._ends_within(PATIENCE):  # on version 1 a frozen process does not die
            with contextlib.suppress(NsboxError):
                self._container.session.request("freeze", id=self._container.id, frozen=False)
            if not self._ends_within(_UNTIL_DEAD):
                self._container.bodies.remove(self)
                os.close(self.pidfd)
                self._socket.close()
                return
        self.end()

    def _ends_within(self, seconds: float) -> bool:
        return wire.is_ready(self.pidfd, seconds)


@contextlib.contextmanager
def _logs_at_rest() -> Iterator[None]:
    """While this process forks, no other thread is writing a record of its log.

    A fork has the locks as they are. Logging renews those of its handlers in the child, but the
    one of a file below, which a thread holds while it writes, would stay locked there.
    """
    log: Any = logging
    with contextlib.ExitStack() as held:
        held.enter_context(log._lock)  # first, as who closes handlers does
        for reference in list(log._handlerList):
            lock = getattr(reference(), "lock", None)
            # handlers may hold each other's, in any order: no more than a moment's wait
            if lock is not None and lock.acquire(timeout=0.1):
                held.callback(lock.release)
        yield


def _talk(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(_LENGTH.pack(len(data)) + data)
    header = sock.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(header) < _LENGTH.size:
        os._exit(1)  # nobody is left to hear the rest
    (length,) = _LENGTH.unpack(header)
    return sock.recv(length, socket.MSG_WAITALL) if length else b""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]


def call(
    container: Container,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float | None,
) -> Any:
    """Run a function inside and bring its result or its exception out."""
    name = getattr(function, "__qualname__", repr(function))

    def body(talk: Talk) -> None:
        try:
            outcome = ("result", function(*args, **kwargs), "")
        except BaseException as error:
            outcome = ("raised", error, traceback.format_exc())
        try:
            data = pickle.dumps(outcome)
            pickle.loads(data)  # what cannot be read back had better be known here
        except Exception as error:
            kind, value, text = outcome
            why = f"{name} {kind} {value!r}, which cannot be brought out: {error}"
            data = pickle.dumps(("lost", why, text))
        talk(data)

    inside = Inside(container, body, working_directory(container))
    try:
        data = inside.receive(timeout)
        inside.reply()
    except TimeoutError:
        inside.kill()
        raise CallError(f"{name} has not ended within {timeout} s and was killed") from None
    except BaseException:
        inside.kill()
        raise
    code = inside.end()
    if not data:
        raise _no_result(container, name, code)
    kind, value, text = pickle.loads(data)  # the child is the test itself
    if kind == "result":
        return value
    if kind == "lost":
        raise CallError(f"{value}\n{text}".rstrip())
    value.add_note(f"raised inside container {container.name!r}:\n{text}")
    raise value


def _no_result(container: Container, name: str, code: int) -> NsboxError:
    dead = container.death(patience=PATIENCE if code == -signal.SIGKILL else 0)
    if dead is not None:
        return dead
    if code < 0:
        return CallError(f"{name} was killed by {signal.Signals(-code).name}")
    return CallError(f"{name} left its process with status {code} and no result")
