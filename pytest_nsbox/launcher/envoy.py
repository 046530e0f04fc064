"""An ordinary user's launcher has a process that stays outside of its user namespace.

Some things are done only from there: `newuidmap` writes the map of a namespace that it is not in,
and a program that is the uplink, or copies an image, needs the host's network. It does what it is
told over a socket, and when that closes it ends, and with it what it has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from typing import NoReturn

from pytest_nsbox import wire
from pytest_nsbox.errors import SetupError
from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.processes import close_all_but


class Envoy:
    """The launcher's handle on it."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._socket = sock

    @classmethod
    def start(cls) -> Envoy:
        """Fork it off the calling process."""
        ours, theirs = wire.pair()
        pid = os.fork()
        if pid == 0:
            try:
                _live(theirs)
            finally:
                os._exit(1)
        theirs.close()
        return cls(pid, ours)

    def run(self, *command: str) -> str:
        """The same as `run_to_its_end`, outside."""
        reply, _ = wire.request(self._socket, {"op": "run", "command": command})
        return str(reply["output"])

    def keep(self, command: Sequence[str], fds: Sequence[int] = ()) -> int:
        """Start a command that runs as long as the launcher; returns a pidfd.

        A word of the command such as "{0}" becomes the number of that descriptor of `fds`. What
        it writes goes to the launcher's standard error.
        """
        _, received = wire.request(self._socket, {"op": "keep", "command": list(command)}, fds)
        return received[0]

    def close(self) -> None:
        """End it and all that it has started, and wait until they have ended."""
        self._socket.close()
        os.waitpid(self._pid, 0)


def _live(launcher: socket.socket) -> NoReturn:
    libc.set_process_name("nsbox-envoy")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    close_all_but([launcher.fileno()])
    kept: list[subprocess.Popen[bytes]] = []
    while True:
        try:
            received = wire.receive(launcher)
        except OSError:
            received = None
        if received is None:
            for process in kept:
                process.kill()
            for process in kept:
                process.wait()
            os._exit(0)
        message, (answer, *fds) = received
        reply: wire.Message = {}
        out: list[int] = []
        try:
            if message["op"] == "run":
                reply = {"output": run_to_its_end(*message["command"])}
            else:
                kept.append(_start(message["command"], fds))
                out = [os.pidfd_open(kept[-1].pid)]
        except (OSError, SetupError) as error:
            reply = {"error": wire.dump_error(error)}
        finally:
            wire.close_all(fds)
        with socket.socket(fileno=answer) as sock, contextlib.suppress(OSError):
            wire.send(sock, reply, out)
        wire.close_all(out)


def run_to_its_end(*command: str) -> str:
    """Run a command; what it wrote. Raises SetupError, with its words, when it fails, and OSError
    when it cannot be started."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip() or done.stdout.strip()
        raise SetupError(words or f"{command[0]}: exit status {done.returncode}")
    return done.stdout


def _start(command: Sequence[str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    def die_with_the_envoy() -> None:
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(
        [word.format(*fds) for word in command],
        stdin=subprocess.DEVNULL,
        pass_fds=list(fds),
        start_new_session=True,
        preexec_fn=die_with_the_envoy,
    )
