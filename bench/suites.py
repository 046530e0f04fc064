"""Sections about whole runs of pytest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from floor import Floor
from peers import CPUS
from report import FLOOR, Case, Goal, Section, Times, difference, ratio
from unused import Collector
from workbench import LIMITS, Bench, plugins_only

INSIDE_TESTS = 50
PLUGIN = "pytest_nsbox.plugin"
_MARK = f"@pytest.mark.sandbox({', '.join(f'{key}={value!r}' for key, value in LIMITS.items())})"
_WHEN = """
import pathlib
import time

def pytest_runtestloop(session):
    session.config.began = time.monotonic()

def pytest_runtest_logreport(report):
    if report.when == "call":
        ended.append(time.monotonic())

ended = []

def pytest_terminal_summary(config):
    pathlib.Path("took").write_text(str(ended[0] - config.began))
"""


def collect(bench: Bench) -> Section:
    on, off = "with the plugin", "without the plugin"
    directory = bench.directory / "unused"
    collector = bench.stack.enter_context(Collector(directory, PLUGIN, plugins_only("")))
    return Section(
        "What the plugin costs those who do not use it",
        "`pytest --collect-only` of an empty directory, with no other plugin, in a fork of a "
        "process that has done it before (`bench/unused.py`): Python's start and pytest's own "
        "imports, which differ from one time to the next by more than the plugin takes, are not in "
        "it, the plugin's are. Its compiled code is on the disk. Where it is installed, pytest "
        "also reads the list of its files, which is not in this.",
        [
            Case(on, lambda: collector.seconds(PLUGIN)),
            Case(off, lambda: collector.seconds("")),
        ],
        off,
        bench.runs * 4,
        bench.floor,
        difference=True,
        goals=[
            Goal(
                "the plugin, unused",
                3,
                lambda times: difference(times, on, off),
                unit=" ms",
                hindrance="Its hooks, fixtures and options are read and registered one by one: "
                "`PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=pytest_nsbox.plugin "
                "python -X importtime -m pytest --collect-only`.",
            )
        ],
    )


def inside(bench: Bench) -> Section:
    count = INSIDE_TESTS
    mark = f"@pytest.mark.sandbox(cpus={CPUS})\n"
    files = {False: "import pytest\n", True: "import pytest\n"}
    for marked in files:
        for number in range(count):
            files[marked] += f"\n{mark * marked}def test_{number}(): pass\n"
    plain, within, words = f"{count} plain", f"{count} inside", f"{count} passed"
    return Section(
        "Tests that run inside",
        f"A run of pytest over {count} empty tests marked `@pytest.mark.sandbox(cpus={CPUS})`, "
        "each in a new container with network, against one over the same tests without the mark. "
        "The difference per test includes its share of what is paid once per run.",
        [
            Case(within, bench.pytest("inside", files[True], words, plugins=PLUGIN)),
            Case(plain, bench.pytest("plain", files[False], words, plugins=PLUGIN)),
        ],
        plain,
        max(2, bench.runs // 20),
        bench.floor,
        difference=True,
        per=count,
    )


def first(bench: Bench) -> Section:
    by_fixture, by_mark = "driven from outside", "the body inside"
    tests = {
        by_fixture: f"import pytest\n\n{_MARK}\ndef test_it(nsbox_container):\n"
        "    nsbox_container.run(['true'], check=True)\n",
        by_mark: f"import pytest\n\n{_MARK}\ndef test_it():\n    pass\n",
    }

    def until_done(name: str) -> Callable[[], float]:
        run = bench.pytest(
            name.replace(" ", "-"), tests[name], "1 passed", conftest=_WHEN, plugins=PLUGIN
        )

        def once() -> float:
            run()
            return float((bench.directory / name.replace(" ", "-") / "took").read_text())

        return once

    return Section(
        "The first container of a run",
        "From the moment that pytest, its collection done, begins to run tests, until the first "
        "test, the only one, has been in its container. The launcher is started while pytest "
        "collects, so here, with one file, there is next to nothing to hide it behind.",
        [Case(name, until_done(name)) for name in tests],
        FLOOR,
        max(3, bench.runs // 8),
        bench.floor,
        goals=[
            Goal(f"the first container, {name}", 250, _median(name), unit=" ms") for name in tests
        ],
    )


def _median(name: str) -> Callable[[Times], float]:
    return lambda times: statistics.median(times[name])


def boxed(count: int) -> str:
    """A file of so many quick tests, each with a container."""
    return (
        f"import pytest\n\n{_MARK}\n{_each(count)}def test_it(nsbox_container, n):\n"
        "    nsbox_container.run(['true'], check=True)\n"
    )


def _each(count: int) -> str:
    return f"@pytest.mark.parametrize('n', range({count}))\n"


def throughput(bench: Bench) -> Section:
    count = bench.count
    plain = f"import pytest\n\n{_each(count)}def test_it(n):\n    pass\n"
    words, plugins = f"{count} passed", f"{PLUGIN} xdist.plugin"
    ours, bare = f"{count} tests, a container each, -n 2", f"{count} empty tests, -n 2"
    floors = [
        bench.stack.enter_context(Floor(bench.directory, name)) for name in ("floor1", "floor2")
    ]
    twice = f"{FLOOR}, {count // 2} containers twice side by side"

    def side_by_side() -> float:
        start = time.perf_counter()
        for floor in floors:
            floor.begin(count // 2)
        for floor in floors:
            floor.end()
        return time.perf_counter() - start

    def without_pytest(times: Times) -> str:
        more = statistics.median(times[ours]) - statistics.median(times[bare])
        return (
            "What pytest and pytest-xdist take for themselves, measured by the empty tests, is in "
            f"that; without it, the ratio is {more / statistics.median(times[twice]):.2f}."
        )

    return Section(
        "A suite on two workers",
        f"The whole run of `pytest -n 2` (pytest-xdist) over {count} tests that take a container "
        "with limits and network and run `true` in it, from the start of pytest to its end, "
        f"against two floor programs that make {count // 2} containers each at the same time.",
        [
            Case(ours, bench.pytest("boxed", boxed(count), words, "-n2", plugins=plugins)),
            Case(bare, bench.pytest("bare", plain, words, "-n2", plugins=plugins)),
            Case(twice, side_by_side),
        ],
        twice,
        2,
        bench.floor,
        goals=[
            Goal(
                f"throughput: {count} tests, -n 2 / the floor twice",
                1.3,
                ratio(ours, twice),
                hindrance="Two workers and their launchers keep two processors busy: what decides "
                "is the processors' time, of which a test with its container takes several times "
                "what the floor program does, as is shown below.",
            )
        ],
        remarks=[without_pytest],
        warm_up=False,
    )
