"""Whether containers have become slower: a short run beside the recorded ratios.

    .venv/bin/python bench/guard.py [--fail | --record]

What is recorded in ratios.json, and compared, are multiples of the floor program in the same run,
so that another machine, or a slow day, does little to them. It takes less than a minute and shows
what has become more than a quarter slower; other load on the machine can look like that, so it
fails only with `--fail`. Run as root.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import lives
import suites
from report import FLOOR, Section, Times, machine, table
from workbench import Bench

RATIOS = Path(__file__).with_name("ratios.json")
MOST = 1.25
_MULTIPLES = "multiples of the floor program"
Make = Callable[[Bench], Section]
WATCHED: dict[str, tuple[Make, int]] = {
    "cold, back to back": (lives.create, 60),
    "cold, 100 ms apart": (lives.paused, 40),
    "warm, until the first result": (lives.warm, 60),
    'run(["true"])': (lives.run, 100),
    "a test inside": (suites.inside, 3),
}


def measure() -> dict[str, float]:
    """What is watched, as multiples of the floor program."""
    found = {}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory("", "bench-", "/var/tmp"))
        bench = Bench(stack, Path(directory), runs=2, count=20)
        bench.peers = []  # nobody else
        for name, (make, runs) in WATCHED.items():
            with ExitStack() as bench.stack:
                section = make(bench)
                # a difference is one to the last case
                cases = section.cases if section.difference else section.cases[:1]
                short = dataclasses.replace(section, cases=cases, runs=runs)
                found[name] = multiple(short, short.measure())
    return found


def multiple(section: Section, times: Times) -> float:
    """The first case of a section, as a multiple of the floor program."""
    first = section.cases[0].name
    cost = section.relative(times, first) if section.difference else statistics.median(times[first])
    assert cost is not None
    return cost / statistics.median(times[FLOOR])


def record(found: dict[str, float]) -> None:
    """Write what later runs are compared with."""
    rounded = {name: round(value, 3) for name, value in found.items()}
    said = {"machine": [*machine([])], _MULTIPLES: rounded}
    RATIOS.write_text(json.dumps(said, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether containers have become slower.")
    parser.add_argument("--fail", action="store_true", help="fail if one has by more than 25 %%")
    parser.add_argument("--record", action="store_true", help="write ratios.json instead")
    options = parser.parse_args()
    now = measure()
    if options.record:
        record(now)
        return 0
    recorded = json.loads(RATIOS.read_text())[_MULTIPLES]
    rows = [[_MULTIPLES, "recorded", "now", "now / recorded", ""]]
    slower = []
    for name, value in now.items():
        change = value / recorded[name]
        if change > MOST:
            slower.append(name)
        verdict = "**slower**" if change > MOST else ""
        rows.append([name, f"{recorded[name]:.2f}", f"{value:.2f}", f"{change:.2f}", verdict])
    print("\n".join(table(rows, numbers=[1, 2, 3])))
    if slower:
        print(f"\nMore than {MOST - 1:.0%} slower against the floor: {', '.join(slower)}.")
    return bool(slower and options.fail)


if __name__ == "__main__":
    sys.exit(main())
