"""A launcher in which the k-th step of building or taking down fails: python -m tests.faulty.

The production code has no such thing in it: every step goes through a few functions, which are
replaced here before the launcher starts. Who is to fail is read from shared memory, so that one
session goes through all steps, in the launcher and in the inits that it has forked.
"""

from __future__ import annotations

import functools
import mmap
import os
import runpy
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

LAYOUT = struct.Struct("=5i")  # who, k, errno, steps so far, whether it has failed
LAUNCHER, INIT = 0, 1
FILE = "NSBOX_FAULT"


def plan(path: str) -> mmap.mmap:
    """The shared memory, made when it is not there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        return mmap.mmap(fd, mmap.PAGESIZE)
    finally:
        os.close(fd)


def main() -> None:
    from pytest_nsbox.kernel import cgroup_files, libc, mounts, netlink
    from pytest_nsbox.launcher import ledger, zygote

    zygote.Zygote.may_fork_ahead = lambda self: False  # type: ignore[method-assign]

    shared, launcher = plan(os.environ[FILE]), os.getpid()

    def step(what: str) -> None:
        who, k, errno, steps, failed = LAYOUT.unpack_from(shared)
        if k and who == (LAUNCHER if os.getpid() == launcher else INIT):
            steps += 1
            LAYOUT.pack_into(shared, 0, who, k, errno, steps, failed or steps == k)
            if steps == k:
                raise OSError(errno, f"{what}: {os.strerror(errno)}")

    def before(owner: Any, name: str, kind: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def wrapped(*args: Any, **options: Any) -> Any:
            step(f"{kind} {args[1] if len(args) > 1 and isinstance(args[1], str) else args[:1]}")
            return real(*args, **options)

        setattr(owner, name, wrapped)

    for name in ("mkdir", "write", "rmdir"):
        before(cgroup_files, name, name)
    for name in ("unshare", "sethostname"):
        before(libc, name, name)
    before(netlink.Netlink, "send", "netlink send")
    before(ledger.Ledger, "record", "record")
    before(zygote.Zygote, "fork_init", "fork")
    run = mounts.run

    class Failing:
        def __init__(self, real: mounts.Step) -> None:
            self.describe: Callable[[], str] = real.describe
            self.real = real

        def do(self) -> None:
            step(self.describe())
            self.real.do()

    def run_failing(steps: Iterable[mounts.Step]) -> None:
        run(Failing(each) for each in steps)

    mounts.run = run_failing
    runpy.run_module("pytest_nsbox.launcher", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
