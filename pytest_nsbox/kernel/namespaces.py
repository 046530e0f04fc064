"""Namespaces by the names that /proc/PID/ns has for them (namespaces(7))."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from pytest_nsbox.kernel import libc

FLAGS = {
    "cgroup": libc.CLONE_NEWCGROUP,
    "ipc": libc.CLONE_NEWIPC,
    "mnt": libc.CLONE_NEWNS,
    "net": libc.CLONE_NEWNET,
    "pid": libc.CLONE_NEWPID,
    "time": libc.CLONE_NEWTIME,
    "user": libc.CLONE_NEWUSER,
    "uts": libc.CLONE_NEWUTS,
}


def open_namespace(kind: str, pid: int | str = "self") -> int:
    """A descriptor that holds a process's namespace."""
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def entered(kind: str, fd: int) -> Iterator[None]:
    """Be in another namespace for a while; not for those that cannot be left again."""
    own = open_namespace(kind)
    try:
        libc.setns(fd, FLAGS[kind])
        try:
            yield
        finally:
            libc.setns(own, FLAGS[kind])
    finally:
        os.close(own)


def set_uptime(seconds: float) -> None:
    """Start the clocks of the time namespace made for the next child at `seconds`.

    The offsets are against the host's clocks and may be written until the first process is in
    (time_namespaces(7)).
    """
    lines = []
    for clock in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME):
        offset = int((seconds - time.clock_gettime(clock)) * 1e9)
        whole, nanoseconds = divmod(offset, 10**9)
        lines.append(f"{clock} {whole} {nanoseconds}")
    fd = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, "\n".join(lines).encode())
    finally:
        os.close(fd)
