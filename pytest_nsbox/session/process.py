"""A command in a container, with the interface of `subprocess.Popen`.

It is a Popen: pipes, text modes and `communicate` are the standard library's own. Only what
starts, signals and waits for the process is replaced, by requests to the container's init.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from pytest_nsbox import wire
from pytest_nsbox.errors import NsboxError
from pytest_nsbox.model.results import Usage
from pytest_nsbox.session.surroundings import of_a_command

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container

UNTIL_KILLED = 2.0  # seconds for PID 1 to kill, where it may be stopped or hindered itself
Arguments = str | bytes | os.PathLike[str] | Sequence[str | bytes | os.PathLike[str]]


class Process(subprocess.Popen[Any]):
    """A running command: the members of `subprocess.Popen`, `pid` being the one inside.

    Where `stdout` or `stderr` is not given, what it writes there is kept: `log` has it, and the
    report of a failing test shows its end.
    """

    def __init__(
        self,
        container: Container,
        args: Arguments,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        timeout: float | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        **options: Any,
    ) -> None:
        self.container = container
        self.reaper: int | None = None
        self.usage: Usage | None = None
        self._started = time.monotonic()
        self._answer: socket.socket | None = None
        self._log: IO[bytes] | None = None
        self._logged = ""
        self._order = of_a_command(container, env, cwd, user)
        self._timeout = timeout
        self._order["tree"] = timeout is not None
        refused = {"preexec_fn", "startupinfo", "creationflags", "close_fds"} & set(options)
        if refused:
            raise TypeError(f"{refused.pop()} means nothing in a container")
        if stdout is None or stderr is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as we do
        super().__init__(
            args,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=self._log if stdout is None else stdout,
            stderr=self._log if stderr is None else stderr,
            **options,
        )

    # The signature is the standard library's, which passes all by position.
    def _execute_child(self, args: Any, executable: Any, _preexec: Any, _close: Any, *rest: Any):  # type: ignore[no-untyped-def]
        pass_fds, _cwd, _env, _info, _flags, shell, *more = rest
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[:6]
        if isinstance(args, (str, bytes, os.PathLike)):
            args = [args]
        args = [os.fsdecode(arg) for arg in args]
        if any("\0" in arg for arg in args):
            raise ValueError("embedded null byte")
        if shell:
            args = [os.fsdecode(executable or "/bin/sh"), "-c", *args]
        elif executable is not None:
            args[0] = os.fsdecode(executable)
        self._answer, theirs = wire.pair()
        try:
            with theirs:
                stdio = [p2cread, c2pwrite, errwrite]
                self.container.ask_init(
                    {"op": "exec", "args": args, **self._order},
                    [theirs.fileno(), *stdio, *pass_fds],
                )
            self.pid = self._await_start()
            self._child_created = True
        except BaseException as error:
            if isinstance(error, TimeoutError):
                with contextlib.suppress(NsboxError, OSError):
                    if self.reaper is not None:
                        self.kill_tree(timeout=UNTIL_KILLED)
            if self._answer is not None:
                self._answer.close()
                self._answer = None
            self._close_log()
            if isinstance(error, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, self._timeout or 0) from None
            raise
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _await_start(self) -> int:
        while True:
            message = self._receive(self.left())
            if message is None:
                raise self.container.why_dead()
            wire.raise_error(message)
            if "started" in message:
                return int(message["started"])
            if "exit" in message:  # its reaper was killed before it could say so
                self._finish(message)
                return self.pid or self.reaper or 0
            if "reaper" in message:
                self.reaper = int(message["reaper"])
            else:
                self.pid = int(message["pid"])

    def left(self) -> float | None:
        """Seconds until its timeout; None where it has none."""
        if self._timeout is None:
            return None
        return max(self._started + self._timeout - time.monotonic(), 0)

    def _receive(self, timeout: float | None) -> wire.Message | None:
        """The next word from init; None when it is gone. Raises TimeoutError."""
        assert self._answer is not None
        poll = select.poll()
        poll.register(self._answer, select.POLLIN)
        if not poll.poll(None if timeout is None else max(timeout * 1000, 0)):
            raise TimeoutError
        try:
            received = wire.receive(self._answer)
        except (OSError, ValueError):
            return None
        if received is None:
            return None
        message, fds = received
        wire.close_all(fds)
        return message

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.returncode is None and self._answer is not None:
            with contextlib.suppress(TimeoutError):
                self._finish(self._receive(0))
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            try:
                self._finish(self._receive(timeout))
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self.returncode

    def _finish(self, message: wire.Message | None) -> None:
        """Take down how it ended; with its init gone, it was killed."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        if message is None:
            self.returncode = -signal.SIGKILL
            return
        self.returncode = int(message["exit"])
        self.usage = Usage(
            cpu=float(message["user"]) + float(message["system"]),
            wall=float(message["wall"]),
            peak_memory=int(message["peak"]),
        )

    def send_signal(self, sig: int) -> None:
        """Send a signal; nothing happens when it has ended already.

        A paused container goes on first, as with `docker kill`: it would not arrive before.
        """
        if self.poll() is None:
            if self.container.paused:
                self.container.unpause()
            self.container.request_init({"op": "kill", "pid": self.pid, "signal": int(sig)})

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def kill_tree(self, timeout: float | None = None) -> None:
        """SIGKILL for the command and for all that it has started."""
        message: wire.Message = {"op": "kill_tree", "pid": self.reaper or self.pid}
        if self.reaper is not None and self.pid is not None and self.pid != self.reaper:
            message["session"] = self.pid
        self.container.request_init(message, timeout)

    def log(self) -> str:
        """What it has written so far where no other place was given for it."""
        if self._log is not None:
            # the offset is shared with the process that writes, so it must not be moved
            size = os.fstat(self._log.fileno()).st_size
            return os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        return self._logged

    def _close_log(self) -> None:
        self._logged = self.log()
        if self._log is not None:
            self._log.close()
            self._log = None

    def fileno(self) -> int | None:
        """What becomes readable (poll(2)) when it ends; None when it has."""
        return None if self._answer is None else self._answer.fileno()

    def abandon(self) -> None:
        """It will not be heard of again: its container has gone, or the wait for it has."""
        if self.returncode is None:
            with contextlib.suppress(TimeoutError):
                self._finish(self._receive(0) if self._answer else None)
            if self.returncode is None:
                self._finish(None)
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()
        self._close_log()


def describe_end(process: Process) -> str:
    """A process's command, how it ended and the last it wrote."""
    args = process.args
    command = args if isinstance(args, str) else " ".join(map(str, args))  # type: ignore[arg-type]
    code = process.poll()
    if code is None:
        ended = "is running"
    elif code < 0:
        ended = f"was killed by {signal.Signals(-code).name}"
    else:
        ended = f"has ended with status {code}"
    last = "\n".join(process.log().splitlines()[-10:])
    return f"{command!r} {ended}" + (f"; it wrote last:\n{last}" if last else "")
