"""Each controller by a limit that bites: a probe like the others, but with many outcomes."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pytest_nsbox.kernel import cgroup, libc
from pytest_nsbox.kernel.probe import Lacking, Outcome, outcome_of
from pytest_nsbox.model.limits import Limits

_PATIENCE = 1.0


def control_groups(driver: cgroup.Driver | None, why_not: str) -> Iterator[Outcome]:
    """One outcome for each of CONTROLLERS, each by a limit that bites."""
    if driver is None:
        yield from [Outcome(False, why_not)] * len(CONTROLLERS)
        return
    try:
        for probe in CONTROLLERS.values():

            def run(probe: Callable[[cgroup.Driver], str | None] = probe) -> str | None:
                try:
                    return probe(driver) or f"cgroup v{driver.version}"
                finally:
                    _clear()

            yield outcome_of(run)
    finally:
        driver.close()


_groups: list[cgroup.Cgroup] = []


def _clear() -> None:
    while _groups:
        group = _groups.pop()
        group.kill()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        group.remove()


def _group(driver: cgroup.Driver, limits: Limits, device: str | None = None) -> cgroup.Cgroup:
    group = driver.create(f"probe-{os.urandom(3).hex()}", limits, device)
    _groups.append(group)
    return group


def _join(group: cgroup.Cgroup | None, body: Callable[[], int]) -> int:
    """Fork a process that runs `body` in the group; returns its pid."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
            if group is not None:
                group.attach(0)
            status = body()
        finally:
            os._exit(status)
    return pid


def _status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _memory(driver: cgroup.Driver) -> str | None:
    group = _group(driver, Limits(memory=16 << 20))

    status = _status(_join(group, lambda: _grow(64 << 20)))
    if status != -signal.SIGKILL:
        raise Lacking(f"memory=16M lets a process have 64 MiB (it ended with {status})")
    return None


def _swap(driver: cgroup.Driver) -> str | None:
    """Without swap a process over its memory is killed, however much swap the host has."""
    group = _group(driver, Limits(memory=16 << 20, swap=0))
    status = _status(_join(group, lambda: _grow(24 << 20)))
    if status != -signal.SIGKILL:
        raise Lacking(f"memory=16M, swap=0 lets a process have 24 MiB (it ended with {status})")
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        return f"cgroup v{driver.version}; the host has no swap to use"
    return None


def _grow(size: int) -> int:
    rows = bytearray(size)
    rows[::4096] = b"1" * len(rows[::4096])
    return 0


def _pids(driver: cgroup.Driver) -> str | None:
    group = _group(driver, Limits(pids=2))

    def fork() -> int:
        for _ in range(3):
            try:
                if os.fork() == 0:
                    signal.pause()
            except BlockingIOError:
                return 11
        return 0

    if _status(_join(group, fork)) != errno.EAGAIN:
        raise Lacking("pids=2 lets a process fork twice")
    return None


def _cpu(driver: cgroup.Driver) -> str | None:
    group = _group(driver, Limits(cpus=0.1))

    def spin() -> int:
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass
        return 0

    _status(_join(group, spin))
    if not group.stats().throttled:
        raise Lacking("cpus=0.1 does not throttle")
    return None


def _cpuset(driver: cgroup.Driver) -> str | None:
    core = min(os.sched_getaffinity(0))
    group = _group(driver, Limits(cpuset=str(core)))
    if _status(_join(group, lambda: os.sched_getaffinity(0) != {core})):
        raise Lacking(f"cpuset={core} lets a process run elsewhere")
    return None


def _io(driver: cgroup.Driver) -> str | None:
    """Direct writes, as those are throttled by both versions, to a file that has no name."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = cache if os.path.isdir(cache) else os.path.expanduser("~")
    number = os.stat(directory).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    group = _group(driver, Limits(io={"wbps": 1 << 20}), device)
    file = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    page = mmap.mmap(-1, 1 << 16)  # what is written directly has to be aligned

    def write() -> int:
        for at in range(4):
            os.pwrite(file, page, at * len(page))
        return 0

    def timed(where: cgroup.Cgroup | None) -> float:
        started = time.monotonic()
        if _status(_join(where, write)):
            raise Lacking("a direct write fails")
        return time.monotonic() - started

    free = timed(None)
    throttled = timed(group)
    if throttled < free + 0.1:  # at least 0.15 s for 256 KiB
        raise Lacking(f"io={{'wbps': '1M'}} lets a process write 256 KiB in {throttled:.2f} s")
    return None


def _freezer(driver: cgroup.Driver) -> str | None:
    """Who is frozen does not answer, and does when thawed."""
    group = _group(driver, Limits())
    question, ask = os.pipe()
    answer, tell = os.pipe()

    def answer_all() -> int:
        while os.read(question, 1):
            os.write(tell, b"1")
        return 0

    _join(group, answer_all)
    poll = select.poll()
    poll.register(answer, select.POLLIN)

    def answers(patience: float) -> bool:
        os.write(ask, b"1")
        return bool(poll.poll(patience * 1000))

    if not answers(_PATIENCE) or not os.read(answer, 1):
        raise Lacking("a process in a cgroup does not run")
    group.freeze()
    if answers(0.05):
        raise Lacking("a frozen process goes on")
    group.thaw()
    if not poll.poll(_PATIENCE * 1000):
        raise Lacking("a process that was frozen stays so")
    return None


CONTROLLERS: dict[str, Callable[[cgroup.Driver], str | None]] = {
    "memory": _memory,
    "swap": _swap,
    "pids": _pids,
    "cpu": _cpu,
    "cpuset": _cpuset,
    "io": _io,
    "freezer": _freezer,
}
