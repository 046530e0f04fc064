"""A fork of the test process that becomes one of the container's.

It is what runs a test's body inside, and `Container.call`. Only this file of init is used by the
test process: what happens here happens inside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from pytest_nsbox.init.confine import Confinement, confinement
from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.namespaces import FLAGS, open_namespace


@dataclass(frozen=True)
class Ticket:
    """What it takes to enter a container."""

    pidfd: int  # of its PID 1
    cgroup_procs: Sequence[int]
    own_network: bool
    own_time: bool
    own_user: bool
    capabilities: frozenset[str] | None  # None: privileged

    def close(self) -> None:
        for fd in (self.pidfd, *self.cgroup_procs):
            os.close(fd)

    def confinement(self) -> Confinement | None:
        """Prepared before the fork, where all is still in reach."""
        if self.capabilities is None:
            return None
        return confinement(self.capabilities)


def fork_into(ticket: Ticket, body: Callable[[], int], cwd: str | None) -> int:
    """Fork; the child enters the container and exits with what `body` returns.

    Returns the child's pid in the caller's own PID namespace. `cwd` is the directory the child
    starts in, or the root where it does not exist inside. Raises OSError.
    """
    confined = ticket.confinement()
    with _children_in(ticket.pidfd) as own:
        with warnings.catch_warnings():
            # of threads, which do not come along: what the child does is the test's own business
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.close(own)
            _child(ticket, confined, body, cwd)
    return pid


def _child(
    ticket: Ticket, confined: Confinement | None, body: Callable[[], int], cwd: str | None
) -> NoReturn:
    status = 127
    try:
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
        for fd in ticket.cgroup_procs:
            os.write(fd, b"0")
        kinds = ["mnt", "ipc", "uts", "cgroup"]
        kinds += ["net"] * ticket.own_network + ["time"] * ticket.own_time
        kinds += ["user"] * ticket.own_user
        flags = 0
        for kind in kinds:
            flags |= FLAGS[kind]
        libc.setns(ticket.pidfd, flags)
        ticket.close()
        with contextlib.suppress(OSError):
            os.chdir(cwd or "/")
        if confined is not None:
            confined.apply()
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials clears it
        status = body()
    except BaseException:
        traceback.print_exc()  # the parent can only see that no result has come
    finally:
        os._exit(status)


@contextlib.contextmanager
def _children_in(pidfd: int) -> Iterator[int]:
    """Children forked within start in the PID namespace of another process."""
    own = open_namespace("pid")
    try:
        libc.setns(pidfd, FLAGS["pid"])
        yield own
    finally:
        libc.setns(own, FLAGS["pid"])
        os.close(own)
