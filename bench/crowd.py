"""The section about many containers at once."""

from __future__ import annotations

import resource
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from report import Case, Goal, Section, Times, ratio
from workbench import LIMITS, Bench

from pytest_nsbox import Container, Session

_ALL = "MemAvailable"
_FIELDS = {
    "AnonPages": "of processes",
    "Shmem": "of files in memory",
    "SUnreclaim": "of the kernel's objects",
    "SReclaimable": "of its caches",
    "Percpu": "of what it keeps for each CPU",
    "PageTables": "of page tables",
    "KernelStack": "of stacks",
}
_AROUND = 10  # one creation alone says little: the median of so many


def crowd(bench: Bench) -> Section:
    count = bench.count
    early, late, gone = "around the 10th", f"around the {count}th", f"all {count} gone"
    memory: dict[str, float] = {}

    def taken() -> Times:
        times: list[float] = []
        with ExitStack() as stack:
            _many_descriptors(stack)
            session = bench.session(stack, pool=0)
            containers = [_made(session, times)]  # what is there once is there
            before = _memory()
            while len(containers) < count:
                containers.append(_made(session, times))
            after = _memory()
            for field, kb in after.items():
                memory[field] = abs(kb - before[field]) / (count - 1)
            memory["init"] = statistics.median(_own(c.pid) for c in containers[:: count // 10])
            start = time.perf_counter()
            session.close()
            took = time.perf_counter() - start
        return {
            early: times[10 - _AROUND // 2 : 10 + _AROUND // 2],
            late: times[-_AROUND:],
            gone: [took * 1e3],
        }

    return Section(
        f"{count} containers alive",
        f"{count} containers with limits and network are made one after the other, on one network, "
        f"and none is taken down; {_AROUND} creations around the 10th are compared with the last "
        f"{_AROUND}. Then the session is closed, with all of them alive; its launcher ends when "
        "nothing is left. Memory is what the machine has less of, kernel and all, for each; and "
        "what a container's init shares with no other process (`smaps_rollup`).",
        [Case(early), Case(late), Case(gone)],
        early,
        _AROUND,
        bench.floor,
        settle=True,
        goals=[
            Goal(
                f"creation of the {count}th / the 10th",
                1.5,
                ratio(late, early),
                hindrance="pivot_root(2) goes through all processes of the machine, twice for each "
                "container, and a limit on cpus through all control groups; the trace beside "
                "1,000 is below.",
            ),
            Goal(
                "memory of each container",
                1024,
                lambda times: memory[_ALL],
                unit=" kB",
                hindrance="PID 1 is a Python process: what it writes to is its own.",
            ),
            Goal(f"{count} containers gone", 10, lambda times: times[gone][0] / 1e3, unit=" s"),
        ],
        remarks=[
            lambda times: (
                f"Of its memory, an init has {memory['init'] / 1024:.0f} kB for itself alone. By "
                "proc_meminfo(5), each container takes "
                + ", ".join(f"{memory[field]:.0f} kB {what}" for field, what in _FIELDS.items())
                + "."
            )
        ],
        taken=taken,
    )


def _made(session: Session, times: list[float]) -> Container:
    start = time.perf_counter()
    container = session.container(**LIMITS)
    times.append((time.perf_counter() - start) * 1e3)
    return container


def _many_descriptors(stack: ExitStack) -> None:
    """A session holds a few for each container."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))


def _memory() -> dict[str, int]:
    """In kB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = dict(line.split(":") for line in lines)
    return {field: int(values[field].split()[0]) for field in (_ALL, *_FIELDS)}


def _own(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = dict(line.split(":") for line in lines)
    return sum(int(values[key].split()[0]) * 1024 for key in ("Private_Clean", "Private_Dirty"))
