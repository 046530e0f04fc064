"""What containers cost, beside other programs and beside a floor, in one run.

    [ci/engines] .venv/bin/python bench/compare.py [--runs N] [--count N] [--only NAME] [--write]

Run as root, on a machine that does nothing else; ci/engines has Docker and podman. The cases of a
section take turns, so that what drifts (clock rate, caches, other load) hits all alike. `--write`
makes docs/performance.md, its plot, the table of goals in README.md, and ratios.json, which
`guard.py` compares with.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import crowd
import forked
import guard
import lives
import shares
import suites
from plot import Bar, plot
from report import FLOOR, Section, Times, machine, table
from workbench import CRUN, OURS, ROOT, Bench

SECTIONS = {
    "create": lives.create,
    "paused": lives.paused,
    "engines": lives.engines,
    "warm": lives.warm,
    "run": lives.run,
    "inside": suites.inside,
    "forked": forked.each,
    "unhurried": forked.unhurried,
    "suite": forked.suite,
    "throughput": suites.throughput,
    "crowd": crowd.crowd,
    "first": suites.first,
    "collect": suites.collect,
    "image": lives.image,
    "shares": shares.shares,
}
PLOTTED = {
    "create": "Create, run true, destroy: back to back",
    "paused": "Create, run true, destroy: 100 ms apart",
    "warm": "From the request to the first result, with a pool",
}
README_MARKS = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
PICTURE = "![The main figures as bars]"
Measured = dict[str, tuple[Section, Times]]


def measure(bench: Bench, names: list[str]) -> Iterator[tuple[str, Section, Times]]:
    """Each section, as soon as it has been measured."""
    for name in names:
        with ExitStack() as bench.stack:
            section = SECTIONS[name](bench)
            yield name, section, section.measure()


def goals(measured: Measured) -> list[str]:
    """A table of all goals."""
    rows = [["", "goal", "measured", ""]]
    for section, times in measured.values():
        rows += [goal.row(times) for goal in section.goals]
    return list(table(rows, numbers=[1, 2]))


def trace(runs: int) -> Iterator[str]:
    """Where the time goes, by `trace.py`, as a section."""
    yield "## Where the time goes"
    yield ""
    yield (
        "The steps of one creation, of one command and of one test inside, the medians of several, "
        "counted from the call or the test's begin: `python bench/trace.py`, whose notes cost some "
        "time themselves. Several processes work at once, so times overlap. There are 20 ms "
        "between two, after which all is slower than back to back."
    )
    for options, title in (
        (["--pool=0"], "Cold"),
        ([f"--pool={lives.POOL}"], f"With `pool={lives.POOL}`"),
        (["--alive=1000", "--runs=20", "--least=0.03"], "Cold, beside 1,000 alive"),
        (["--run"], 'A command, `container.run(["true"])`'),
        (["--inside"], "A test of 20 ms inside, in a run of such tests, from its set-up on"),
    ):
        command = [sys.executable, str(ROOT / "bench/trace.py"), f"--runs={runs}", *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        yield from ("", f"{title}:", "", done.stdout.rstrip())


def bars(section: Section, times: Times) -> list[Bar]:
    """What of a section is plotted, with the ratio to the floor."""
    floor = statistics.median(times[FLOOR])
    found = []
    for name in (case.name for case in (*section.cases, section.floor)):
        ms = statistics.median(times[name])
        kind = "ours" if name.startswith(OURS) else "floor" if name == FLOOR else "other"
        found.append((name, ms, ms / floor, kind))
    return found


def write(page: list[str], measured: Measured) -> None:
    """The page, its plot, the table of the README, and what `guard.py` compares with."""
    (ROOT / "docs/performance.md").write_text("\n".join(page).rstrip() + "\n")
    groups = {PLOTTED[name]: bars(*measured[name]) for name in PLOTTED}
    (ROOT / "docs/performance.svg").write_text(plot(groups, "of the floor"))
    names = {make: name for name, make in SECTIONS.items()}
    watched = {label: measured[names[make]] for label, (make, _) in guard.WATCHED.items()}
    guard.record({label: guard.multiple(*found) for label, found in watched.items()})
    readme = ROOT / "README.md"
    lines = "\n".join([*goals(measured), "", f"{PICTURE}(docs/performance.svg)"]) + "\n"
    readme.write_text(README_MARKS.sub(lambda _: lines, readme.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description="What containers cost, beside other programs.")
    parser.add_argument("--runs", type=int, default=80, help="runs of each case (default: 80)")
    parser.add_argument(
        "--count", type=int, default=1000, help="containers alive at once, tests of the suite"
    )
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section")
    parser.add_argument("--write", action="store_true", help="write the pages of this repository")
    options = parser.parse_args()
    if options.runs < 2 or options.count < 20:
        parser.error("--runs is at least 2, --count at least 20")
    if os.geteuid() != 0:
        parser.error("containers with limits and a network of their own need root here")
    if missing := [name for name in ("umoci", "busybox") if shutil.which(name) is None]:
        parser.error(f"{missing[0]} is needed for an image; apt install umoci busybox-static")
    if options.only and options.write:
        parser.error("--write is for all sections, so that a page comes from one run")
    # a plugin's compiled code is kept, as on any machine that has not been told otherwise
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for number in (signal.SIGINT, signal.SIGTERM):  # both clean up, also where a shell has
        signal.signal(number, signal.default_int_handler)  # a job in the background ignore one
    lines: list[str] = []
    measured: Measured = {}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory("", "bench-", "/var/tmp"))
        bench = Bench(stack, Path(directory), options.runs, options.count)
        about = [*machine(bench.versions)] if bench.peers else [*machine([])]
        for name, section, times in measure(bench, options.only or list(SECTIONS)):
            measured[name] = section, times
            found = [*section.report(times)]
            print("\n".join(found), flush=True)
            lines += found
    if not options.only:
        found = [*trace(40)]
        print("\n".join(found))
        lines += found
    head = ["# What it costs", "", *about, ""]
    head += [
        f"Measured by `python bench/compare.py --runs {options.runs}`; {CRUN} and the others "
        "in the same run. The goals are ratios, so that they hold on other machines.",
        "",
    ]
    head += [*goals(measured), ""]
    print("\n".join(head))
    if options.write:
        write([*head, f"{PICTURE}(performance.svg)", "", *lines], measured)


if __name__ == "__main__":
    main()
