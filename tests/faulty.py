"""A launcher in which the k-th step fails: python -m tests.faulty.

The production code has no such thing in it. Every step goes through a few functions, which are
replaced here before the launcher starts: system calls, files of control groups, netlink, the
ledger, and the steps of a plan. Who is to fail is read from shared memory, so that one session goes
through all steps, in the launcher, in the zygote and in the inits that it forks.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import runpy
import struct
import sys
from collections.abc import Callable, Iterable
from errno import (
    EACCES,
    EAGAIN,
    EBUSY,
    EDQUOT,
    EEXIST,
    EINVAL,
    EIO,
    EMFILE,
    ENFILE,
    ENOBUFS,
    ENODEV,
    ENOMEM,
    ENOSPC,
    EPERM,
    EROFS,
)
from typing import Any

HEAD = struct.Struct("=5i")  # who, k, errno, steps so far, whether it has failed
# how many inits, containers and footings may be made ahead; the launcher counts
AHEAD = struct.Struct("=3i")
_TEXT = HEAD.size + AHEAD.size  # where the kind and the object of the step that has failed are
LAUNCHER, ZYGOTE, INIT = 1, 2, 3
WHO = {LAUNCHER: "launcher", ZYGOTE: "zygote", INIT: "init"}
FILE = "NSBOX_FAULT"

_NEW_DESCRIPTOR = (EMFILE, ENFILE, ENOMEM)

# What each may fail with by its man page. EINTR is not among them: where one of these calls knows
# it, Python repeats the call (PEP 475).
PLAUSIBLE: dict[str, tuple[int, ...]] = {
    "open": (EACCES, EMFILE, ENFILE, ENOMEM),
    "dup": _NEW_DESCRIPTOR,
    "pipe": _NEW_DESCRIPTOR,
    "pidfd_open": _NEW_DESCRIPTOR,
    "socketpair": _NEW_DESCRIPTOR,
    "netlink socket": (EPERM, *_NEW_DESCRIPTOR),
    "eventfd": _NEW_DESCRIPTOR,
    "fork": (EAGAIN, ENOMEM),
    "mkdir": (EACCES, ENOSPC, EROFS, ENOMEM),
    "rmdir": (EACCES, EBUSY),
    "unlink": (EACCES, EIO),
    "write": (EPERM, EACCES, EBUSY, EINVAL, ENOMEM),
    "sysctl": (EACCES, EPERM, EINVAL),
    "netlink send": (EPERM, EEXIST, EBUSY, ENOBUFS, ENOMEM),
    "record": (ENOSPC, EDQUOT, EIO, EROFS),
    "unshare": (EPERM, ENOSPC, ENOMEM),
    "setns": (EPERM, EINVAL, ENOMEM),
    "sethostname": (EPERM,),
    "mount": (EPERM, EACCES, EBUSY, EINVAL, ENODEV, ENOMEM, ENOSPC),
    "umount2": (EPERM, EBUSY, EINVAL),
    "pivot_root": (EPERM, EBUSY, EINVAL),
    "open_tree": (EPERM, EINVAL, *_NEW_DESCRIPTOR),
    "make_read_only": (EPERM, EINVAL),
    "prctl": (EPERM, EINVAL),
    "capset": (EPERM,),
    "seccomp_set_filter": (EACCES, EINVAL, ENOMEM),
    "plan": (EACCES, ENOSPC, EIO),
}


class Plan:
    """The shared memory: who is to fail at which step, and what that step was."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        finally:
            os.close(fd)

    def arm(self, who: int, k: int, choose: int) -> None:
        """Fail the k-th step of `who`, by the `choose`-th of what is plausible for it."""
        self._memory[_TEXT:] = bytes(mmap.PAGESIZE - _TEXT)
        HEAD.pack_into(self._memory, 0, who, k, choose, 0, 0)

    @property
    def ahead(self) -> tuple[int, int]:
        """How many inits may still be forked ahead, and how many containers begun."""
        inits, containers, _ = AHEAD.unpack_from(self._memory, HEAD.size)
        return inits, containers

    @ahead.setter
    def ahead(self, most: tuple[int, int]) -> None:
        AHEAD.pack_into(self._memory, HEAD.size, *most, self.footings)

    @property
    def footings(self) -> int:
        """The same for what containers stand on."""
        return int(AHEAD.unpack_from(self._memory, HEAD.size)[2])

    @footings.setter
    def footings(self, most: int) -> None:
        AHEAD.pack_into(self._memory, HEAD.size, *self.ahead, most)

    def disarm(self) -> tuple[int, str, str] | None:
        """The errno, the kind and the object of the step that has failed; None when it has not
        come to that."""
        _, _, _, steps, failed = HEAD.unpack_from(self._memory)
        HEAD.pack_into(self._memory, 0, 0, 0, 0, steps, 0)
        if not failed:
            return None
        kind, _, what = self._memory[_TEXT:].rstrip(b"\0").decode().partition("\0")
        return failed, kind, what

    @property
    def steps(self) -> int:
        """How many there have been since it was armed, also after it was disarmed."""
        return int(HEAD.unpack_from(self._memory)[3])

    def step(self, who: Callable[[], int], kind: str, what: str) -> None:
        armed, k, choose, steps, failed = HEAD.unpack_from(self._memory)
        if not armed or armed != who():
            return
        steps += 1
        if steps == k:
            errnos = PLAUSIBLE[kind]
            failed = errnos[choose % len(errnos)]
            text = f"{kind}\0{what}".encode()[: mmap.PAGESIZE - _TEXT]
            self._memory[_TEXT : _TEXT + len(text)] = text
        HEAD.pack_into(self._memory, 0, armed, k, choose, steps, failed)
        if steps == k:
            raise _error(failed, kind, what)


def _error(number: int, kind: str, what: str) -> OSError:
    """As the real one raises it: Python names a file apart, our own wrappers in the text."""
    if kind in ("open", "mkdir", "rmdir", "unlink") and what:
        return OSError(number, os.strerror(number), what)
    return OSError(number, f"{kind} {what}: {os.strerror(number)}" if what else os.strerror(number))


def ahead_as_allowed(shared: Plan) -> None:
    """Nothing is made ahead but when a test lets it, or it would go through the steps at its own
    time."""
    from pytest_nsbox.launcher.footing import Footing
    from pytest_nsbox.launcher.pool import Kind, Pool
    from pytest_nsbox.launcher.zygote import Zygote

    may_fork, fork, wants, fill = Zygote.may_fork_ahead, Zygote.fork_ahead, Pool.wants, Pool.fill
    lay, make_footing = Zygote.lay_foundation, Footing.make_ahead

    def may_fork_ahead(self: Zygote) -> bool:
        return shared.ahead[0] > 0 and may_fork(self)

    def one_init_less() -> None:
        inits, containers = shared.ahead
        shared.ahead = inits - 1, containers

    def fork_ahead(self: Zygote, *, visited: bool) -> None:
        try:
            fork(self, visited=visited)
        finally:
            if self._ahead is None or not visited:
                one_init_less()

    def lay_foundation(self: Zygote, *args: Any) -> None:
        try:
            lay(self, *args)
        finally:
            one_init_less()

    def make_footing_ahead(self: Footing, id: int) -> None:
        if shared.footings > 0:
            shared.footings -= 1
            make_footing(self, id)

    def wants_as_allowed(self: Pool) -> Kind | None:
        return wants(self) if shared.ahead[1] > 0 else None

    def fill_and_count(self: Pool) -> None:
        inits, containers = shared.ahead
        try:
            fill(self)
        finally:
            shared.ahead = inits, containers - 1

    Zygote.may_fork_ahead, Zygote.fork_ahead = may_fork_ahead, fork_ahead  # type: ignore[method-assign]
    Zygote.lay_foundation = lay_foundation  # type: ignore[method-assign]
    Footing.make_ahead = make_footing_ahead  # type: ignore[method-assign]
    Pool.wants, Pool.fill = wants_as_allowed, fill_and_count  # type: ignore[method-assign]


def main() -> None:
    from pytest_nsbox import wire
    from pytest_nsbox.kernel import cgroup_files, libc, mounts, netlink, sysctl
    from pytest_nsbox.launcher import forks, ledger

    shared, launcher = Plan(os.environ[FILE]), os.getpid()
    ahead_as_allowed(shared)
    inits: set[int] = set()

    def who() -> int:
        pid = os.getpid()
        return LAUNCHER if pid == launcher else INIT if pid in inits else ZYGOTE

    def before(
        owner: Any, name: str, kind: str, what: Callable[..., object] = lambda *args: ""
    ) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def wrapped(*args: Any, **options: Any) -> Any:
            shared.step(who, kind, str(what(*args)))
            return real(*args, **options)

        setattr(owner, name, wrapped)

    def instead_of(name: str, kind: str) -> None:
        """The C function itself, where several of ours call it: it fails by errno."""
        real = getattr(libc, name)

        def failing(*args: Any) -> Any:
            try:
                shared.step(who, kind, "")
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1
            return real(*args)

        setattr(libc, name, failing)

    def first(*args: Any) -> object:
        return args[0] if isinstance(args[0], (str, os.PathLike)) else ""

    def second(*args: Any) -> object:
        return args[1]

    for name in ("open", "mkdir", "rmdir", "unlink"):
        before(os, name, name, first)
    for name in ("dup", "pidfd_open", "fork"):
        before(os, name, name)
    before(os, "pipe2", "pipe")
    before(wire, "pair", "socketpair")
    before(netlink.Netlink, "__init__", "netlink socket")
    before(cgroup_files, "write", "write", first)
    before(sysctl, "write", "sysctl", first)
    for name in ("eventfd", "prctl", "capset", "seccomp_set_filter"):
        before(libc, name, name)
    for name in ("fork", "unshare", "setns"):
        instead_of(f"_{name}", name)
    for name in ("sethostname", "umount2", "pivot_root", "open_tree", "make_read_only"):
        before(libc, name, name, first)
    before(libc, "mount", "mount", second)
    before(ledger.Ledger, "record", "record", lambda *args: args[2])
    real_send = netlink.Netlink.send

    def send(self: netlink.Netlink, requests: Iterable[netlink.Request]) -> None:
        requests = list(requests)
        shared.step(who, "netlink send", requests[0].describe() if requests else "")
        real_send(self, requests)

    netlink.Netlink.send = send  # type: ignore[method-assign]
    real_run, real_init = mounts.run, forks.run_init

    class Failing:
        def __init__(self, real: mounts.Step) -> None:
            self.describe: Callable[[], str] = real.describe
            self.real = real

        def do(self) -> None:
            shared.step(who, "plan", self.describe())
            self.real.do()

    def run(steps: Iterable[mounts.Step]) -> None:
        real_run(Failing(each) for each in steps)

    def run_init(*args: Any) -> None:
        inits.add(os.getpid())
        real_init(*args)

    mounts.run = run
    forks.run_init = run_init  # type: ignore[assignment]
    runpy.run_module("pytest_nsbox.launcher", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
