"""Try by force whether anything stays behind, and print the figures.

    .venv/bin/python -m tests.chaos [--kills N] [--faults all|N] [--containers N] [--seed N]
                                    [--plant cgroup|layer|process]...

Run as root, on a machine that does nothing else meanwhile. Sessions are killed at random moments;
every step of a session is made to fail, with `--faults N` so many of each part; and many containers
are used one after the other. 0 leaves one of these out. `--plant` leaks on purpose: that has to be
found. The exit status is 1 when anything was left.
"""

from __future__ import annotations

import argparse
import random
import sys

from tests.chaos import faults, kills, long


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, metavar="N")
    parser.add_argument("--faults", default="all", metavar="all|N")
    parser.add_argument("--containers", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    kinds = ("cgroup", "layer", "process")
    parser.add_argument("--plant", choices=kinds, action="append", default=[])
    options = parser.parse_args()
    wrong = 0
    if options.kills:
        killed = kills.go_through(options.kills, random.Random(options.seed), options.plant)
        print(*killed.table(), f"seed {options.seed}", "", sep="\n", flush=True)
        wrong += sum(killed.leaks.values())
    if options.faults != "0":
        tally = faults.Tally()
        sample = None if options.faults == "all" else int(options.faults)
        for stage in faults.STAGES:
            tell = lambda line: print("WRONG", line, flush=True)  # noqa: E731
            faults.go_through(stage, tally, sample=sample, seed=options.seed, tell=tell)
        print(*tally.table(), "", sep="\n", flush=True)
        wrong += sum(map(len, tally.wrong.values()))
    if options.containers:
        table, flat = long.go_through(options.containers)
        print(*table, sep="\n", flush=True)
        wrong += not flat
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
