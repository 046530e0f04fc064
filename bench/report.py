"""How a section of the page is measured and written."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """Something to be timed: `once` does it and returns the seconds that it took."""

    name: str
    once: Callable[[], float]
    includes: str = ""


@dataclass(frozen=True)
class Section:
    """Cases measured together, against the one named `base`.

    `settle`: each is run twice in a row and the second run counts, so that each pays for what it
    leaves to the kernel to clean up, and for nobody else's. `pause`: seconds before each.
    `per`: the difference to the base is divided by this. `goals`: the most a case may cost, as a
    ratio to the base, or as a difference in ms.
    """

    title: str
    text: str
    cases: list[Case]
    base: str
    runs: int
    settle: bool = False
    pause: float = 0
    difference: bool = False
    per: int = 1
    goals: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def measure(self) -> dict[str, list[float]]:
        """Milliseconds of each case; the first round is a warm-up and not counted."""
        times: dict[str, list[float]] = {case.name: [] for case in self.cases}
        for number in range(-1, self.runs):
            for case in self.cases:
                if self.settle:
                    case.once()
                time.sleep(self.pause)
                seconds = case.once()
                if number >= 0:
                    times[case.name].append(seconds * 1000)
        return times

    def relative(self, times: dict[str, list[float]], name: str) -> float | None:
        """A case's cost relative to the base; differences are taken round by round."""
        if self.base not in times:
            return None
        if not self.difference:
            return statistics.median(times[name]) / statistics.median(times[self.base])
        pairs = zip(times[name], times[self.base], strict=True)
        return statistics.median(mine - base for mine, base in pairs) / self.per

    def report(self, times: dict[str, list[float]]) -> Iterator[str]:
        """The section in Markdown."""
        each = " per test" if self.per > 1 else ""
        against = f"ms more{each} than {self.base}" if self.difference else f"ratio to {self.base}"
        header = ["", "median ms", "quartiles", "min", "max", against]
        rows = [[*header, "what it includes"] if self.cases[0].includes else header]
        for case in self.cases:
            values = times[case.name]
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            relative = self.relative(times, case.name)
            cells = [case.name, _ms(middle), f"{_ms(low)} to {_ms(high)}", _ms(min(values))]
            cells += [_ms(max(values)), "" if relative is None else f"{relative:.2f}"]
            rows.append([*cells, case.includes][: len(rows[0])])
        yield from (f"## {self.title}", "", f"{self.text} {self.runs} runs of each.", "")
        yield from _table(rows)
        yield ""
        for name, goal in self.goals.items():
            relative = self.relative(times, name)
            if relative is not None:
                word = "met" if relative <= goal else "missed"
                yield f"Goal: {name}, {against}, at most {goal:g}: {relative:.2f}, {word}.\n"
        yield from (f"{remark}\n" for remark in self.remarks)


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = range(1, 6)
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
