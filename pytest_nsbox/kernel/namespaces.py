"""Namespaces by the names that /proc/PID/ns has for them (namespaces(7))."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping

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


class Home(contextlib.AbstractContextManager["Home"]):
    """The namespaces that the calling process is in, so that it finds back from a visit; made by
    who is at home. Only for kinds that can be left again, and in a process of one thread."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self._namespaces = {kind: open_namespace(kind) for kind in kinds}
        # who enters a mount namespace is at its root, whatever its own is and was (setns(2))
        place = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._root, self._directory = os.open("/", place), os.open(".", place)

    def __exit__(self, *exc_info: object) -> None:
        for fd in (*self._namespaces.values(), self._root, self._directory):
            os.close(fd)

    @contextlib.contextmanager
    def away(self, namespaces: Mapping[str, int], root: int | None = None) -> Iterator[None]:
        """Be in others for a while: a descriptor of each by its kind, and of the root to have in
        that of mounts."""
        of: dict[int, list[str]] = {}  # a pidfd may stand for several
        for kind, fd in namespaces.items():
            of.setdefault(fd, []).append(kind)
        entered: list[str] = []
        try:
            for fd, kinds in of.items():
                entered += kinds
                libc.setns(fd, sum(FLAGS[kind] for kind in kinds))
            if root is not None:
                _be_at(root)
            yield
        finally:
            self._return(entered, root is not None)

    def _return(self, kinds: Iterable[str], to_root: bool) -> None:
        try:
            for kind in kinds:
                return_to(self._namespaces[kind], FLAGS[kind])
            if to_root:
                _be_at(self._root)
                os.fchdir(self._directory)
        except OSError:  # astray, it would do to the wrong files what it does next
            signal.raise_signal(signal.SIGKILL)


@contextlib.contextmanager
def in_network(netns: int, home: int) -> Iterator[None]:
    """Be in a network namespace for a while, then in `home` again: descriptors of both."""
    libc.setns(netns, libc.CLONE_NEWNET)
    try:
        yield
    finally:
        libc.setns(home, libc.CLONE_NEWNET)


def _be_at(root: int) -> None:
    os.fchdir(root)
    os.chroot(".")


def return_to(own: int, flag: int) -> None:
    """To the namespace that a process belongs in. It is lost where that fails, so what a kernel
    short of memory refuses is tried again."""
    for _ in range(2):
        try:
            return libc.setns(own, flag)
        except OSError:
            continue
    return libc.setns(own, flag)


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
