"""Kill sessions at random moments and look at what is left.

Victims are short sessions without pytest and runs of pytest, a few side by side. Each batch is
killed in one way; then the machine must be as it was within the grace of 2 s or, where the launcher
was killed too, after the sweep that the next session begins with.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_nsbox.kernel import processes
from pytest_nsbox.launcher import ledger
from tests.audit import awake, take

HERE = Path(__file__).parent
MEMORY = Path("/sys/fs/cgroup/memory")
LIFE = 2.5  # seconds; the moment of a kill is drawn from these
GRACE = 2.0  # seconds in which who survives takes all down
LATE = 20.0  # seconds after which what is there has been left behind
PATIENCE = 90.0  # seconds by which a victim must have ended
BATCH, MIXED = 4, 5  # how many are killed at the same time

# whether the launcher survives, and so has to have taken all down by itself
KINDS = {
    "SIGKILL pytest": True,
    "SIGKILL launcher": False,
    "SIGKILL init": True,
    "SIGKILL init ahead": True,
    "SIGKILL zygote": True,
    "SIGKILL janitor": False,
    "SIGKILL pytest, launcher": False,
    "SIGTERM": True,
    "SIGINT twice": True,
    "SIGHUP": True,
    "SIGSTOP, SIGKILL": True,
    "os._exit": True,
    "segfault": True,
    "out of memory": False,
    "SIGKILL xdist worker": True,
}
SIGNALS = {
    "SIGKILL pytest": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "SIGHUP": signal.SIGHUP,
}


# who is started in the background ignores these, and so does what it starts
_WITH_SIGNALS = ["env", "--default-signal=INT,HUP,TERM"]


@dataclass
class Tally:
    """Kills are counted one by one, the rest by the batch."""

    kills: dict[str, int]
    swept: dict[str, int]
    late: dict[str, int]
    leaks: dict[str, int]

    def table(self) -> Iterator[str]:
        columns = (self.kills, self.swept, self.late, self.leaks)
        row = "{:26} {:>6} {:>6} {:>11} {:>12}".format
        yield row("killed by", "kills", "swept", "late > 2 s", "left behind")
        for kind in self.kills:
            yield row(kind, *(column[kind] for column in columns))
        yield row("all", *(sum(column.values()) for column in columns))


class Victim:
    """One session, and how it is going to end."""

    def __init__(self, kind: str, dice: random.Random, plant: list[str], stack: ExitStack) -> None:
        self.kind = kind
        self.dice = dice
        self.delay = dice.uniform(0, LIFE)
        self.killed = False
        self.planted: Path | None = None
        in_pytest = kind == "SIGKILL xdist worker" or (
            not plant
            and kind in (*SIGNALS, "SIGINT twice", "SIGSTOP, SIGKILL")
            and dice.random() < 0.3
        )
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        # with room for all that it uses; with a pool there is next to never an init alone ahead
        pool = 0 if kind == "SIGKILL init ahead" else dice.choice((0, 6))
        command = [sys.executable, "-m", "tests.chaos.victim", kind, str(self.delay), str(pool)]
        if in_pytest:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            command += [f"--basetemp={directory}/tmp", f"--nsbox-pool={pool}"]
            command += ["--noconftest", str(HERE / "suite.py")]  # for a cache that is looked at
            command += ["-p", "xdist", "-n2"] * (kind == "SIGKILL xdist worker")
        env = dict(os.environ)
        if plant:
            self.planted = Path(directory, "planted")
            env["NSBOX_CHAOS_PLANT"] = " ".join(plant)
            env["NSBOX_CHAOS_PLANTED"] = str(self.planted)
        if kind == "out of memory":
            self.group = MEMORY / f"chaos-{os.getpid()}-{dice.randrange(1 << 32):x}"
            self.group.mkdir()
            stack.callback(self.group.rmdir)
            (self.group / "memory.limit_in_bytes").write_text("400M")
            command = ["sh", "-c", f'echo 0 > {self.group}/tasks; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            [*_WITH_SIGNALS, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.at = time.monotonic() + self.delay

    def end(self) -> None:
        """Wait for the moment, and do it."""
        while self.planted and not self.planted.exists() and self.process.poll() is None:
            self._pause(0.02)
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            if self.kind in ("os._exit", "segfault", "out of memory"):
                self.killed = self.process.wait(PATIENCE) != 0
                return
            self.process.wait(max(self.at - time.monotonic(), 0.001))
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                self._kill()

    def _kill(self) -> None:
        pid = self.process.pid
        if self.kind in SIGNALS:
            self._send(pid, SIGNALS[self.kind])
        elif self.kind == "SIGINT twice":
            self._send(pid, signal.SIGINT)
            self._pause(0.3)
            self._send(pid, signal.SIGINT)
        elif self.kind == "SIGSTOP, SIGKILL":
            self._send(pid, signal.SIGSTOP)
            self._pause(0.2)
            self._send(pid, signal.SIGKILL)
        elif self.kind == "SIGKILL pytest, launcher":
            both = [pid, *self._find("launcher")]
            self.dice.shuffle(both)
            for each in both:
                self._send(each, signal.SIGKILL)
        else:
            who = self.kind.split()[-1]
            while not (found := self._find(who)):
                self._pause(0.02)
                if self.process.poll() is not None:
                    return
            self._send(self.dice.choice(found), signal.SIGKILL)

    def _send(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            self.killed = True

    def _pause(self, most: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.dice.uniform(0, most) or 0.001)

    def _find(self, who: str) -> list[int]:
        """The launcher, init, one ahead, zygote, janitor or xdist worker below it."""
        below, found = {self.process.pid}, []
        everybody = sorted(processes.all_of_them(), key=lambda process: process.start)
        for process in everybody:
            if process.parent not in below:
                continue
            below.add(process.pid)
            with suppress(OSError):
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                ours = process.name.startswith("nsbox-")
                is_launcher = b"pytest_nsbox.launcher" in command and not ours
                is_worker = b"exec(eval(" in command
                if process.name == f"nsbox-{who}" or {
                    "launcher": is_launcher,
                    "worker": is_worker,
                }.get(who, False):
                    found.append(process.pid)
        return found

    def wait(self) -> bool:
        """False when it has to be killed, since it goes on."""
        for _ in awake(PATIENCE):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
                return True
        self.process.kill()
        self.process.wait()
        return False


def go_through(number: int, dice: random.Random, plant: list[str]) -> Tally:
    """Kill so many, batch by batch; each batch in one way."""
    kinds = [kind for kind in KINDS if kind != "out of memory" or MEMORY.is_dir()]
    tally = Tally(*(dict.fromkeys(kinds, 0) for _ in range(4)))
    os.environ["PYTHONPATH"] = str(HERE.parent.parent)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["PYTEST_PLUGINS"] = "pytest_nsbox.plugin"
    before = take()
    while True:
        print(f"{sum(tally.kills.values())} of {number} kills", file=sys.stderr, flush=True)
        for batch in _batches(kinds, number):
            missing = number - sum(tally.kills.values())
            if missing <= 0:
                return tally
            with ExitStack() as stack:
                victims = [Victim(kind, dice, plant, stack) for kind in batch[:missing]]
                for victim in sorted(victims, key=lambda each: each.at):
                    victim.end()
                hung = sum(not victim.wait() for victim in victims)
                for victim in victims:
                    tally.kills[victim.kind] += victim.killed
                kind = batch[0]
                left = _left(before, GRACE)
                if left:
                    tally.swept[kind] += _sweep()
                    if not KINDS[kind] or plant:
                        left = _left(before, GRACE)
                if left and not plant:  # a busy machine needs longer than an idle one
                    tally.late[kind] += not (left := _left(before, LATE))
                if left or hung:
                    tally.leaks[kind] += 1
                    by = ", ".join(dict.fromkeys(victim.kind for victim in victims))
                    print(f"LEFT by {by}; {hung} hung:", *left, sep="\n  ", flush=True)
                    if plant:
                        _clear(left)
                    before = take()


def _batches(kinds: list[str], number: int) -> Iterator[list[str]]:
    """Who is killed at the same time: those of one kind, or where there are to be few of each,
    one of each, with those apart whose launcher is killed as well."""
    if number >= BATCH * len(kinds):
        yield from ([kind] * BATCH for kind in kinds)
        return
    for survives in (True, False):
        some = [kind for kind in kinds if KINDS[kind] is survives]
        yield from (some[n : n + MIXED] for n in range(0, len(some), MIXED))


def _sweep() -> bool:
    return bool(ledger.sweep_all(ledger.state_directory(), ledger.cache_directory()))


def _left(before: object, grace: float) -> list[str]:
    try:
        before.must_equal_soon(grace)  # type: ignore[attr-defined]
    except AssertionError as error:
        return str(error).splitlines()[1:]
    return []


def _clear(left: list[str]) -> None:
    """Remove what has been planted."""
    for line in left:
        kind, _, what = line.partition(": + ")
        if kind == "processes":
            os.kill(int(what.split()[0]), signal.SIGKILL)
        elif kind == "cgroups":
            os.rmdir(what)
        elif kind == "files" and what.endswith("-planted"):
            shutil.rmtree(what)
