"""The section about processor time: how much of it a container takes, and in which process.

On two cores side by side, and where tests follow one another closely, this and not the time that
passes is what decides. It is counted for the whole machine, what the kernel does later included.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from forked import FORKED, forked
from lives import POOL
from report import Case, Section, table
from suites import PLUGIN, boxed
from workbench import BWRAP, CRUN, LIMITS, OURS, Bench

_LIVES, _TESTS = 50, 100
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_AFTER = 0.5  # seconds in which the kernel has freed what was taken down
_REST = "inits and commands that have ended, the kernel for itself"


def _busy() -> float:
    """Seconds that all processors have worked: all of the first line of proc_stat(5) but idle,
    iowait, and what is of guests, which is in it twice."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) * _TICK


def _each(function: Callable[[], object], count: int) -> Callable[[], float]:
    """Processor seconds of each of the `count` things that `function` does."""

    def once() -> float:
        before = _busy()
        function()
        time.sleep(_AFTER)
        return (_busy() - before) / count

    return once


def _repeat(function: Callable[[], object]) -> Callable[[], float]:
    return _each(lambda: [function() for _ in range(_LIVES)], _LIVES)


def shares(bench: Bench) -> Section:
    """Sections' cases again, by processor time."""
    pooled = bench.session(bench.stack, POOL)
    ours = {f"{OURS}, pool=0": bench.cold, f"{OURS}, pool={POOL}": pooled}
    lives = {name: bench.life(session, **LIMITS) for name, session in ours.items()}
    peers = {case.name: case.once for name in (CRUN, BWRAP) for case in bench.peer_named(name)}
    mark = f"import pytest\npytestmark = pytest.mark.sandbox(**{LIMITS!r})\n"
    empty = "".join(f"\ndef test_{number}(): pass\n" for number in range(_TESTS))
    words = f"{_TESTS} passed"
    both = f"{PLUGIN} pytest_forked"
    runs = {
        "a test inside": bench.pytest("share-inside", mark + empty, words, plugins=PLUGIN),
        "a test with a container, -n 2": bench.pytest(
            "share-boxed", boxed(_TESTS), words, "-n2", plugins=f"{PLUGIN} xdist.plugin"
        ),
        "a plain test": bench.pytest("share-plain", empty, words, plugins=PLUGIN),
        "a plain test, -n 2": bench.pytest(
            "share-plain-2", empty, words, "-n2", plugins=f"{PLUGIN} xdist.plugin"
        ),
    }
    by_fork = forked(bench, bench.pytest("share-fork", empty, words, "--forked", plugins=both))
    runs |= {f"a test, {FORKED}": case.once for case in by_fork}
    return Section(
        "The processor's time",
        "What all processors of the machine have worked for each, the kernel's work after it "
        f"included: {_LIVES} containers one after the other, and runs of pytest over {_TESTS} "
        "empty tests, their start and end included. Where tests run side by side on all cores, "
        "this, divided by the cores, is the least that each can take.",
        [
            *(Case(name, _repeat(once)) for name, once in (lives | peers).items()),
            *(Case(name, _each(run, _TESTS)) for name, run in runs.items()),
        ],
        bench.floor.name,
        max(2, bench.runs // 20),
        Case(bench.floor.name, _repeat(bench.floor.once), bench.floor.includes),
        remarks=[lambda _: by_process(lives)],
        warm_up=False,
    )


def by_process(lives: dict[str, Callable[[], float]]) -> str:
    """A table: which process took how much of it."""
    columns: list[Counter[str]] = []
    for once in lives.values():
        for _ in range(_LIVES):
            once()
        time.sleep(_AFTER)
        before, busy = _processes(), _busy()
        for _ in range(_LIVES):
            once()
        time.sleep(_AFTER)
        spent = _processes()
        spent.subtract(before)
        spent[_REST] = _busy() - busy - sum(spent.values())
        columns.append(spent)
    names = {name for column in columns for name, seconds in column.items() if seconds > 0}
    rows = [["processor ms for each container", *lives]]
    for name in [*sorted(names - {_REST}), _REST]:
        rows.append([name, *(f"{column[name] * 1e3 / _LIVES:.2f}" for column in columns)])
    totals = (sum(column.values()) * 1e3 / _LIVES for column in columns)
    rows.append(["all", *(f"{total:.2f}" for total in totals)])
    return "By process:\n\n" + "\n".join(table(rows, numbers=range(1, len(rows[0]))))


def _processes() -> Counter[str]:
    """The processor time so far of this process and of its descendants, by name, with
    what its children had that it has waited for (proc_pid_stat(5))."""
    found: Counter[str] = Counter()
    for pid in _descendants(os.getpid()):
        name, fields = _stat(pid)
        if not name:
            continue
        who = {"python": "test process" if pid == os.getpid() else "launcher"}.get(name, name)
        found[who] += sum(map(int, fields[11:15])) * _TICK
    return found


def _stat(pid: int) -> tuple[str, list[str]]:
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")
    except (FileNotFoundError, ProcessLookupError):
        return "", []
    return head.partition("(")[2], tail.split()


def _descendants(pid: int) -> Iterable[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield from _descendants(int(child))
