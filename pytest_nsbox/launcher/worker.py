"""Work on files that takes its time, done by a child, so that the launcher can go on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pytest_nsbox import wire
from pytest_nsbox.errors import NsboxError
from pytest_nsbox.kernel import processes

_DEEPEST = 5000  # directories in each other; a path of the kernel has 2,048 at most


@dataclass(frozen=True)
class Work:
    """`job` runs in the child and gives the answers to the request; `fds` are kept open for it.
    `done` is called in the launcher after the child has ended."""

    job: Callable[[], Iterable[wire.Message]]
    fds: Sequence[int] = ()
    done: Callable[[], None] | None = None

    def start(self, answer: socket.socket) -> tuple[int, int]:
        """Fork the child; returns its pid and a pidfd."""
        keep = {answer.fileno(), *self.fds}
        pid = processes.fork_child("nsbox-worker", keep, lambda: self._work(answer))
        return pid, os.pidfd_open(pid)

    def _work(self, answer: socket.socket) -> None:
        _make_room()
        try:
            for message in self.job():
                wire.send(answer, message)
        except (OSError, NsboxError, RecursionError) as error:
            wire.send(answer, wire.dump_failure(error))


def _make_room() -> None:
    """A descriptor and a call for each directory on the way down."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.setrecursionlimit(_DEEPEST * 2)


def stop(pid: int, pidfd: int) -> None:
    """Kill a child of the launcher and reap it."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(pidfd)
