"""How a section of the page is measured and written."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Times = dict[str, list[float]]
"""Milliseconds of each case, round by round."""
FLOOR = "floor program"
_NOT_MET = "**not met**"


@dataclass(frozen=True)
class Case:
    """Something to be timed: `once` does it and returns the seconds that it took."""

    name: str
    once: Callable[[], float] = float
    includes: str = ""


@dataclass(frozen=True)
class Goal:
    """The most that something may cost, or the least that it has to reach; `of` tells it from
    what was measured, None where it was not, with `without` as the reason."""

    what: str
    limit: float
    of: Callable[[Times], float | None]
    unit: str = ""
    least: bool = False
    without: str = ""
    hindrance: str = ""  # what stands in the way where it is not met

    def row(self, times: Times) -> list[str]:
        """For a table: what, the limit, what was measured, and the verdict."""
        value = self.of(times)
        limit = f"{'at least' if self.least else 'at most'} {self.limit:g}{self.unit}"
        if value is None:
            why = self.without or "what it is compared with is missing"
            return [self.what, limit, "not measured", why]
        met = value >= self.limit if self.least else value <= self.limit
        return [self.what, limit, f"{value:.2f}{self.unit}", "met" if met else _NOT_MET]


@dataclass(frozen=True)
class Section:
    """Cases measured together, against the one named `base`, and the floor program among them.

    `settle`: each is run twice in a row and the second run counts, so that each pays for what it
    leaves to the kernel to clean up, and for nobody else's. `pause`: seconds before each.
    `difference`: what is relative is one, not a ratio, round by round. `per`: it is divided by
    this. `taken`: measures instead of taking turns.
    """

    title: str
    text: str
    cases: list[Case]
    base: str
    runs: int
    floor: Case
    settle: bool = False
    pause: float = 0
    difference: bool = False
    per: int = 1
    goals: list[Goal] = field(default_factory=list)
    remarks: list[str | Callable[[Times], str]] = field(default_factory=list)
    warm_up: bool = True
    taken: Callable[[], Times] | None = None

    def measure(self) -> Times:
        """The first round is a warm-up and not counted, where rounds are not long. Turns are taken
        in another order each time, so that none always comes after the same other one."""
        cases = [self.floor] if self.taken else [*self.cases, self.floor]
        order = random.Random(self.title)
        times: Times = {case.name: [] for case in cases}
        for number in range(-1 if self.warm_up else 0, self.runs):
            for case in order.sample(cases, len(cases)):
                if self.settle:
                    time.sleep(self.pause)
                    case.once()
                time.sleep(self.pause)
                seconds = case.once()
                if number >= 0:
                    times[case.name].append(seconds * 1000)
        return {**self.taken(), **times} if self.taken else times

    def relative(self, times: Times, name: str) -> float | None:
        """A case's cost relative to the base."""
        if self.base not in times:
            return None
        if self.difference:
            return difference(times, name, self.base) / self.per
        return ratio(name, self.base)(times)

    def report(self, times: Times) -> Iterator[str]:
        """The section in Markdown."""
        each = " per test" if self.per > 1 else ""
        against = f"ms more{each} than {self.base}" if self.difference else f"ratio to {self.base}"
        header = ["", "median ms", "quartiles", "min", "max", against, f"ratio to floor{each}"]
        if self.base == FLOOR:
            del header[5]
        includes = any(case.includes for case in self.cases)
        rows = [[*header, "what it includes"] if includes else header]
        floor = statistics.median(times[self.floor.name]) * self.per
        for case in [*self.cases, self.floor]:
            values = times[case.name]
            low, middle, high = _quartiles(values)
            cells = [case.name, _ms(middle), f"{_ms(low)} to {_ms(high)}", _ms(min(values))]
            cells.append(_ms(max(values)))
            if self.base != FLOOR:
                relative = None if case is self.floor and self.difference else self.relative
                value = relative(times, case.name) if relative else None
                cells.append("" if value is None else f"{value:.2f}")
            cells.append("" if case is self.floor and self.per > 1 else f"{middle / floor:.2f}")
            rows.append([*cells, case.includes][: len(rows[0])])
        yield from (f"## {self.title}", "", f"{self.text} {self.runs} runs of each.", "")
        yield from table(rows, numbers=range(1, len(header)))
        yield ""
        for goal in self.goals:
            what, limit, value, verdict = goal.row(times)
            more = f" {goal.hindrance}" if verdict == _NOT_MET and goal.hindrance else ""
            yield f"Goal: {what}, {limit}: {value}{verdict and ', ' + verdict}.{more}\n"
        for remark in self.remarks:
            yield f"{remark(times) if callable(remark) else remark}\n"


def ratio(name: str, base: str) -> Callable[[Times], float | None]:
    """The ratio of two medians, for a goal."""

    def of(times: Times) -> float | None:
        if name not in times or base not in times:
            return None
        return statistics.median(times[name]) / statistics.median(times[base])

    return of


def difference(times: Times, name: str, base: str) -> float:
    """The median of the differences, round by round."""
    pairs = zip(times[name], times[base], strict=True)
    return statistics.median(mine - its for mine, its in pairs)


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def table(rows: list[list[str]], numbers: Iterable[int] = ()) -> Iterator[str]:
    """A table in Markdown, its columns `numbers` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = set(numbers)
    rules = ["-" * (w - 1) + ":" if n in numbers else "-" * w for n, w in enumerate(widths)]
    for row in [rows[0], rules, *rows[1:]]:
        cells = zip(row, widths, range(len(row)), strict=True)
        yield f"| {' | '.join(c.rjust(w) if n in numbers else c.ljust(w) for c, w, n in cells)} |"


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """`function`, returning how many seconds it took."""

    def once() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return once


def machine(versions: list[str]) -> Iterator[str]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    split = [line.partition(":") for line in lines]
    info = {key.strip(): value.strip() for key, _, value in split}
    virtual = ", in a virtual machine" if "hypervisor" in info.get("flags", "").split() else ""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    load = f"{os.getloadavg()[0]:.2f}"
    names = ["pytest-nsbox", "pytest", "pyroute2"]
    packages = [f"{name} {importlib.metadata.version(name)}" for name in names]
    yield f"- Linux {platform.release()}, control groups version {2 if unified else 1}"
    yield f"- {os.cpu_count()} CPUs, {info.get('model name', platform.machine())}{virtual}"
    yield f"- Python {platform.python_version()}, {', '.join(packages)}"
    yield f"- {', '.join(versions) or 'no other programs'}"
    yield f"- {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, load average at the start {load}"
