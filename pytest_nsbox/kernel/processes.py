"""Processes as /proc shows them (proc_pid_stat(5)), and children of this one."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pytest_nsbox.kernel import libc


@dataclass(frozen=True)
class Process:
    """One process, told apart from a later one of the same number by its start."""

    pid: int
    name: str
    state: str  # one letter: R, S, D, T, Z
    parent: int
    start: int  # clock ticks since boot


def find(pid: int) -> Process | None:
    """The process with this number; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            before, _, after = file.read().rpartition(b")")
    except OSError:
        return None
    fields = after.split()
    name = before.partition(b"(")[2].decode(errors="replace")
    return Process(pid, name, fields[0].decode(), int(fields[1]), int(fields[19]))


def all_of_them() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := find(int(name))) is not None:
            yield process


def variables(pid: int) -> list[str]:
    """The environment that it was started with; empty where that may not be read."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().decode(errors="replace").split("\0")
    return []


@contextlib.contextmanager
def own_pidfd() -> Iterator[int]:
    """What a child forked within tells by whether its parent lives (`die_with`)."""
    fd = os.pidfd_open(os.getpid())
    try:
        yield fd
    finally:
        os.close(fd)


def die_with(parent: int) -> None:
    """Be killed when the parent ends (prctl(2), PR_SET_PDEATHSIG), and now where it has ended.

    `parent` is its pidfd from before the fork: from another PID namespace its number cannot be
    seen (getppid(2)).
    """
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    if poll.poll(0):
        os.kill(os.getpid(), signal.SIGKILL)


def fork_child(name: str, keep: Iterable[int], work: Callable[[], object]) -> int:
    """Fork a child that does `work` and ends, or dies with this process; returns its pid.

    It is called `name`, and of the descriptors it has only `keep`.
    """
    with own_pidfd() as parent:
        pid = os.fork()
        if pid == 0:
            try:
                die_with(parent)
                libc.set_process_name(name)
                gc.freeze()  # what the parent had is not to be closed a second time
                close_all_but(keep)
                work()
            finally:
                os._exit(0)
    return pid


def close_all_but(keep: Iterable[int]) -> None:
    """Close what belongs to the parent, so that its sockets close when it does."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def below_init(init: int) -> list[tuple[int, str]]:
    """The living processes of the PID namespace of its PID 1 `init`, but that: number and name,
    as they are known inside (pid_namespaces(7))."""
    own = _namespace(init)
    found = []
    for process in all_of_them():
        if process.pid == init or process.state in "ZX" or _namespace(process.pid) != own:
            continue
        with contextlib.suppress(OSError, StopIteration):
            with open(f"/proc/{process.pid}/status", encoding="utf-8", errors="replace") as file:
                line = next(line for line in file if line.startswith("NSpid:"))
            found.append((int(line.split()[-1]), process.name))
    return sorted(found)


def _namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def describe(pids: Iterable[int]) -> str:
    """Who does not end, and where in the kernel it is."""
    words = []
    for pid in sorted(pids):
        process = find(pid)
        if process is None:
            continue
        where = ""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/wchan", encoding="ascii") as file:
            where = file.read().strip("0")
        words.append(f"{pid} ({process.name}) in state {process.state}" + (where and f", {where}"))
    return "; ".join(words) or "nobody that is still to be seen"
