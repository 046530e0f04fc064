"""What containers cost, beside other programs, in one run.

    .venv/bin/python bench/compare.py [--runs N] [--only NAME] [--write FILE]

Run as root, on a machine that does nothing else. The cases of a section take turns, so that what
drifts (clock rate, caches, other load) hits all alike.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import CPUS, MEMORY, PIDS, Peer, PeerError, Runner
from report import Case, Section, machine, timed

from pytest_nsbox import Session

LIMITS: dict[str, Any] = {"cpus": CPUS, "memory": MEMORY, "pids": PIDS}
OURS, CRUN, INSIDE_TESTS = "nsbox", "crun run", 50


class Bench:
    """What the sections share: a session, the peers, a directory."""

    def __init__(self, stack: ExitStack, runs: int) -> None:
        self.runs = runs
        self.stack = ExitStack()  # what one section needs for itself
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        self.runner = stack.enter_context(Runner(self.directory))
        self.session = stack.enter_context(Session())
        self.versions: list[str] = []
        self._missing: list[str] = []
        self._peers = [peer for peer in self.runner.peers() if self._works(peer)]

    def _works(self, peer: Peer) -> bool:
        if not peer.installed:
            self._missing.append(f"{peer.name} is left out: install the package {peer.package}.")
            return False
        try:
            if peer.name == CRUN:
                self.runner.write_config()
            self.runner.seconds(peer.argv)
        except (PeerError, subprocess.CalledProcessError) as error:
            self._missing.append(f"{peer.name} is left out, it fails: {error}")
            return False
        self.versions.append(peer.version())
        return True

    def _life(self, **keywords: Any) -> Callable[[], float]:
        def once() -> None:
            with self.session.container(**keywords) as container:
                container.run(["true"], check=True)

        return timed(once)

    def _peer(self, peer: Peer) -> Case:
        return Case(peer.name, lambda: self.runner.seconds(peer.argv), peer.includes)

    def _lives(self) -> list[Case]:
        wired = "veth on a bridge, address, route, NAT; overlay on /; seccomp; capabilities"
        return [
            Case(OURS, self._life(**LIMITS), f"6 namespaces; cpu, memory, pids limits; {wired}"),
            Case(
                f"{OURS}, no limits",
                self._life(),
                f"6 namespaces; control groups, unlimited; {wired}",
            ),
            Case(
                f'{OURS}, network="none"',
                self._life(network="none", **LIMITS),
                "as the first, with the loopback only",
            ),
            *map(self._peer, self._peers),
        ]

    def create(self) -> Section:
        return Section(
            "Create, run `true`, destroy: back to back",
            "One container's whole life, from the call that makes it to the return of the call "
            "that has taken it down; the session is open already, as it is in a test run. Every "
            "case is run twice in a row, and the second run counts: a network namespace is taken "
            "down by the kernel in the background, and the next creation waits for it. The peers "
            "are started by posix_spawn(3) from a small process, and their time ends with their "
            "exit. crun has the configuration that `crun spec` writes, with the same limits.",
            self._lives(),
            CRUN,
            self.runs,
            settle=True,
            goals={OURS: 2.0},
            remarks=self._missing,
        )

    def paused(self) -> Section:
        return Section(
            "Create, run `true`, destroy: 100 ms apart",
            "The same, with a pause of 100 ms before each, since tests are not back to back: "
            "the first attach to a control group and the first new namespaces after a while are "
            "slower, for everyone.",
            self._lives(),
            CRUN,
            max(2, self.runs // 2),
            pause=0.1,
            goals={OURS: 2.0},
            remarks=self._missing,
        )

    def run(self) -> Section:
        running = self.stack.enter_context(self.session.container(**LIMITS))
        ours, host = 'container.run(["true"])', 'subprocess.run(["true"])'
        argv = ["true"]
        return Section(
            "A command in a running container",
            "From call to return, in this one process, the container and its limits as above. "
            "`container.run` captures both outputs, so `subprocess.run` is shown with that, too. "
            "`container.call` forks the calling process, enters the container, runs a Python "
            "function there and returns its result; it grows with the process.",
            [
                Case(ours, timed(lambda: running.run(argv, check=True))),
                Case("container.call(int)", timed(lambda: running.call(int))),
                Case(host, timed(lambda: subprocess.run(argv, check=True))),
                Case(
                    'subprocess.run(["true"], capture_output=True)',
                    timed(lambda: subprocess.run(argv, check=True, capture_output=True)),
                ),
            ],
            host,
            self.runs,
            settle=True,
            goals={ours: 2.5},
        )

    def _pytest(self, name: str, text: str, expect: str, *options: str) -> Callable[[], float]:
        """A run of pytest over a file of its own, as a subprocess; `expect` is in its output."""
        directory = self.directory / name
        directory.mkdir()
        (directory / "pytest.ini").write_text("[pytest]\n")
        (directory / "test_it.py").write_text(text)
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]

        def once() -> None:
            done = subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True)
            if expect not in done.stdout:
                raise SystemExit(f"{shlex.join(argv)} went wrong:\n{done.stdout}{done.stderr}")

        return timed(once)

    def collect(self) -> Section:
        on, off = "with the plugin", "without the plugin"
        words = "no tests collected"
        return Section(
            "What the plugin costs those who do not use it",
            "`pytest --collect-only` of an empty file, as a new process each time, its start and "
            "end included; its compiled code is on the disk. Without: `-p no:nsbox`. The "
            "difference is the median of the differences round by round.",
            [
                Case(on, self._pytest("on", "", words, "--collect-only")),
                Case(off, self._pytest("off", "", words, "--collect-only", "-p", "no:nsbox")),
            ],
            off,
            self.runs,
            difference=True,
            goals={on: 5.0},
        )

    def _tests(self, count: int, title: str, text: str) -> Section:
        mark = f"@pytest.mark.sandbox(cpus={CPUS})\n"
        files = {False: "import pytest\n", True: "import pytest\n"}
        for marked in files:
            for number in range(count):
                files[marked] += f"\n{mark * marked}def test_{number}(): pass\n"
        plain, inside = f"{count} plain", f"{count} inside"
        return Section(
            title,
            text,
            [
                Case(inside, self._pytest(f"inside{count}", files[True], f"{count} passed")),
                Case(plain, self._pytest(f"plain{count}", files[False], f"{count} passed")),
            ],
            plain,
            max(2, self.runs // 10),
            difference=True,
            per=count,
        )

    def inside(self) -> Section:
        return self._tests(
            INSIDE_TESTS,
            "Tests that run inside",
            f"A run of pytest over {INSIDE_TESTS} empty tests marked "
            f"`@pytest.mark.sandbox(cpus={CPUS})`, each in a new container with network, against "
            "one over the same tests without the mark. The difference per test includes its share "
            "of what is paid once per run.",
        )

    def once(self) -> Section:
        return self._tests(
            1,
            "Once per run",
            "The same with one test: what the first container costs, with the start of the "
            "launcher, the bridge, the way out and their removal at the end.",
        )


SECTIONS = {name: getattr(Bench, name) for name in "create paused run collect inside once".split()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What containers cost, beside other programs.")
    parser.add_argument("--runs", type=int, default=100, help="runs of each case (default: 100)")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a page of all sections")
    options = parser.parse_args()
    if options.runs < 2:
        parser.error("--runs is at least 2")
    if os.geteuid() != 0:
        parser.error("containers with limits and a network of their own need root here")
    if options.only and options.write:
        parser.error("--write is for all sections, so that a page comes from one run")
    # a plugin's compiled code is kept, as on any machine that has not been told otherwise
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for number in (signal.SIGINT, signal.SIGTERM):  # both clean up, also where a shell has
        signal.signal(number, signal.default_int_handler)  # a job in the background ignore one
    with ExitStack() as stack:
        bench = Bench(stack, options.runs)
        page = ["# What it costs", "", *machine(bench.versions), ""]
        page += [f"Measured by `python bench/compare.py --runs {options.runs}`.", ""]
        print("\n".join(page))
        for name in options.only or SECTIONS:
            with ExitStack() as bench.stack:
                section = SECTIONS[name](bench)
                lines = list(section.report(section.measure()))
            print("\n".join(lines), flush=True)
            page += lines
    if options.write:
        options.write.write_text("\n".join(page).rstrip() + "\n")


if __name__ == "__main__":
    main()
