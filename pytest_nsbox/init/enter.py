"""A fork of the test process that becomes one of the container's.

It is what runs a test's body inside, and `Container.call`. Only this file of init is used by the
test process: what happens here happens inside.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from pytest_nsbox.init.confine import Confinement, confinement
from pytest_nsbox.kernel import libc, processes
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
    rootless: bool = False  # the caller has no power of its own over the container
    libraries: Mapping[str, str] = field(default_factory=dict)  # of the caller's system: where

    def close(self) -> None:
        for fd in (self.pidfd, *self.cgroup_procs):
            os.close(fd)

    def confinement(self) -> Confinement | None:
        """Prepared before the fork, where all is still in reach."""
        if self.capabilities is None:
            return None
        found = confinement(self.capabilities)
        found.prepare()
        return found


def fork_into(ticket: Ticket, body: Callable[[], int], cwd: str | None) -> int:
    """Fork; the child enters the container and exits with what `body` returns.

    Returns the child's pid in the caller's own PID namespace. `cwd` is the directory the child
    starts in, or the root where it does not exist inside. Raises OSError.
    """
    confined = ticket.confinement()
    if ticket.libraries:
        from pytest_nsbox.init.libraries import prefer  # while its file is in reach

        inner = body

        def body() -> int:
            prefer(ticket.libraries)
            return inner()

    with processes.own_pidfd() as parent:

        def child() -> NoReturn:
            _child(ticket, confined, body, cwd, parent)

        if ticket.rootless:
            return _fork_by_a_middleman(ticket, child)
        return _fork_directly(ticket, child)


def _fork_directly(ticket: Ticket, child: Callable[[], NoReturn]) -> int:
    with _children_in(ticket.pidfd) as own:
        with warnings.catch_warnings():
            # of threads, which do not come along: what the child does is the test's own business
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.close(own)
            child()
    return pid


def _child(
    ticket: Ticket,
    confined: Confinement | None,
    body: Callable[[], int],
    cwd: str | None,
    parent: int,
) -> NoReturn:
    status = 127
    try:
        processes.die_with(parent)
        for fd in ticket.cgroup_procs:
            os.write(fd, b"0")
        kinds = ["mnt", "ipc", "uts", "cgroup"]
        kinds += ["net"] * ticket.own_network + ["time"] * ticket.own_time
        kinds += ["user"] * (ticket.own_user and not ticket.rootless)
        flags = 0
        for kind in kinds:
            flags |= FLAGS[kind]
        libc.setns(ticket.pidfd, flags)
        ticket.close()
        with contextlib.suppress(OSError):
            os.chdir(cwd or "/")
        if confined is not None:
            confined.apply()
        processes.die_with(parent)  # again: a change of credentials clears it
        os.close(parent)
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


def _fork_by_a_middleman(ticket: Ticket, child: Callable[[], NoReturn]) -> int:
    """The same for an ordinary user, whose power over the container is that of the user namespace
    it is in, which a process cannot leave again: one between enters, forks the child and ends.

    The caller is the subreaper that the child then comes to (prctl(2)). Only with that done does
    the child go on, or the death of its parent would be its own.
    """
    told, tell = os.pipe2(os.O_CLOEXEC)
    go, let_go = os.pipe2(os.O_CLOEXEC)
    was = libc.is_child_subreaper()
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    try:
        between = os.fork()
        if between == 0:
            _between(ticket, tell, (go, let_go), child)
        os.close(tell)
        answer = os.read(told, 256).decode()
        os.waitpid(between, 0)
        if not answer.startswith("pid "):
            number, _, text = answer.partition(" ")
            raise OSError(int(number or 104), text or "the way into the container ended early")
        os.write(let_go, b"\n")
    finally:
        if not was:
            libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 0)
        for fd in (told, go, let_go):
            os.close(fd)
    return int(answer.removeprefix("pid "))


def _between(
    ticket: Ticket, tell: int, gate: tuple[int, int], child: Callable[[], NoReturn]
) -> NoReturn:
    try:
        libc.setns(ticket.pidfd, FLAGS["user"] | FLAGS["pid"])
        pid = os.fork()
        if pid == 0:
            os.close(tell)
            os.close(gate[1])
            if os.read(gate[0], 1):
                child()
            os._exit(127)
        os.write(tell, f"pid {pid}".encode())
    except OSError as error:
        os.write(tell, f"{error.errno} {error.strerror}".encode())
    finally:
        os._exit(0)
