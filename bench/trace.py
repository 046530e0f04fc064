"""Where the time of one creation, one command or one test inside goes, step by step.

    .venv/bin/python bench/trace.py [--runs N] [--pool N] [--alive N] [--rootfs ROOTFS]
    .venv/bin/python bench/trace.py [--runs N] --run | --inside

The launcher, or pytest, is started with its steps wrapped: each notes when it began and ended, on
the clock that all processes share and in memory that all of them share. The notes cost some time,
too. LAYER is a container's writable layer, LAYERS those of an image, VENV where this Python is,
MOUNT another filesystem of the host.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import mmap
import os
import re
import resource
import runpy
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

_FILE = "NSBOX_TRACE"
_MEMORY = "/dev/shm"  # on a disk the first note of each process would wait for a block of it
_LIMITS: dict[str, Any] = {"cpus": 1, "memory": "256M", "pids": 100}
_COUNT = struct.Struct("=i")
_NOTE = struct.Struct("=dd16s56s")
_ROOM, _ROOMS = 512 << 10, 1 << 12  # bytes for the notes of one process, and for how many


class Note(NamedTuple):
    began: float
    ended: float
    who: str
    what: str


class Notes:
    """A room for each process, so that none waits for another."""

    def __init__(self, path: str, who: str = "launcher", child: str = "init") -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, _ROOM * _ROOMS + 1)
            self._memory = mmap.mmap(fd, _ROOM * _ROOMS + 1)
        finally:
            os.close(fd)
        self._move(who)
        os.register_at_fork(after_in_child=lambda: self._move(child))

    def _move(self, who: str) -> None:
        self.who = who
        self._room = int.from_bytes(os.urandom(2)) % _ROOMS * _ROOM

    def start(self) -> None:
        """From now on, in all processes."""
        self._memory[-1] = 1

    def add(self, what: str, began: float) -> None:
        if not self._memory[-1]:
            return
        (count,) = _COUNT.unpack_from(self._memory, self._room)
        place = self._room + _COUNT.size + count * _NOTE.size
        if place + _NOTE.size <= self._room + _ROOM:
            row = (began, time.perf_counter(), self.who.encode(), what.encode()[:56])
            _NOTE.pack_into(self._memory, place, *row)
            _COUNT.pack_into(self._memory, self._room, count + 1)

    def wrap(self, owner: Any, name: str, what: str) -> None:
        """Have a function noted, as `what` says with its arguments."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def noted(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*args, **options)
            finally:
                self.add(what.format(*args), began)

        setattr(owner, name, noted)

    def read(self) -> list[Note]:
        found = []
        for room in range(0, _ROOM * _ROOMS, _ROOM):
            (count,) = _COUNT.unpack_from(self._memory, room)
            for number in range(count):
                row = _NOTE.unpack_from(self._memory, room + _COUNT.size + number * _NOTE.size)
                texts = (text.rstrip(b"\0").decode(errors="replace") for text in row[2:])
                found.append(Note(row[0], row[1], *texts))
        return sorted(found)


def _launch() -> None:
    """Be a launcher whose steps are noted."""
    from pytest_nsbox.init import serve, setup
    from pytest_nsbox.init.confine import Confinement
    from pytest_nsbox.kernel import cgroup_files, libc, mounts, netlink
    from pytest_nsbox.launcher import footing, tree, zygote

    notes = Notes(os.environ[_FILE])
    wrap = notes.wrap
    places = _places()

    def run(steps: Iterable[mounts.Step]) -> None:
        for step in steps:
            began = time.perf_counter()
            step.do()
            text = step.describe()
            for place, name in places.items():
                text = place.sub(name, text)
            notes.add(text, began)

    mounts.run = run
    wrap(cgroup_files, "mkdir", "mkdir cgroup")
    wrap(cgroup_files, "write", "write cgroup")
    wrap(netlink.Netlink, "send", "netlink")
    wrap(zygote.Zygote, "fork_init", "zygote: fork, or hand over the plan")
    wrap(setup, "isolate", "unshare")
    wrap(setup, "join", "join the cgroups")
    wrap(tree.Planner, "plan", "plan the mounts")
    wrap(setup, "connect", "connect with networks, or wait for the order")
    wrap(zygote.Zygote, "lay_foundation", "lay the foundation of the next")
    wrap(footing.Footing, "make_ahead", "make what the next stands on")
    wrap(Confinement, "apply", "capabilities, seccomp")
    wrap(libc, "set_process_name", "call it {0}")
    wrap(serve.Server, "handle", "do what is asked for")
    wrap(serve, "spawn", "start the command (posix_spawn)")
    wrap(serve.Server, "reap", "reap, and say how it ended")
    runpy.run_module("pytest_nsbox.launcher", run_name="__main__", alter_sys=True)


def _places() -> dict[re.Pattern[str], str]:
    """What is elsewhere on another machine, and what to call it."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    mounts = [line.split()[1] for line in lines]
    kept = ("/proc", "/sys", "/dev", "/run", "/tmp")
    own = [re.escape(mount) for mount in mounts if mount != "/" and not mount.startswith(kept)]
    return {
        re.compile(r"/oldroot/\S*/writable/[^/\s]*"): "LAYER",
        re.compile(r"/oldroot/\S*/layers/[^/\s]*"): "LAYERS",
        re.compile(rf"root{re.escape(sys.prefix)}\b"): "root/VENV",
        **{re.compile(rf"root{mount}(?=[/\s]|$)"): "root/MOUNT" for mount in sorted(own)[::-1]},
    }


def _trace(runs: int, pool: int, alive: int, command: bool, rootfs: str | None) -> list[list[Note]]:
    """The notes of each creation, or of a command in a container, in order, counted from its
    beginning."""
    from pytest_nsbox import Session

    start = subprocess.Popen.__init__

    def start_traced(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        if "pytest_nsbox.launcher" in args:
            args = [sys.executable, __file__, *args[args.index("pytest_nsbox.launcher") + 1 :]]
        start(self, args, *rest, **options)

    subprocess.Popen.__init__ = start_traced  # type: ignore[method-assign]
    spec = _LIMITS if rootfs is None else {**_LIMITS, "rootfs": rootfs}
    windows = []
    with tempfile.NamedTemporaryFile(prefix="nsbox-trace-", dir=_MEMORY) as file:
        os.environ[_FILE] = file.name
        with Session(pool=pool) as session, contextlib.ExitStack() as stack:
            for _ in range(alive):
                stack.enter_context(session.container(**spec))
            Notes(file.name).start()
            for _ in range(runs):
                began = time.perf_counter()
                with session.container(**spec) as container:
                    if command:
                        container.run(["true"])
                        time.sleep(0.02)
                        began = time.perf_counter()
                        container.run(["true"])
                    windows.append((began, time.perf_counter()))
                time.sleep(0.02)  # what goes on in the background is of no other creation
        notes = Notes(file.name).read()
    traces = []
    for began, ended in windows[runs // 5 :]:
        own = [note for note in notes if began <= note.began and note.ended <= ended]
        own.append(Note(began, ended, "test", 'run(["true"])' if command else _CREATION))
        traces.append([Note(n.began - began, n.ended - began, n.who, n.what) for n in sorted(own)])
    return traces


def pytest_configure(config: Any) -> None:
    """Be a plugin of a run whose tests are noted."""
    from _pytest import runner

    from pytest_nsbox.init import enter
    from pytest_nsbox.init.confine import Confinement
    from pytest_nsbox.kernel import libc, processes
    from pytest_nsbox.plugin import body, inside
    from pytest_nsbox.session.session import Session

    wrap = Notes(os.environ[_FILE], "pytest", "body").wrap
    wrap(runner, "runtestprotocol", _ONE_TEST)
    wrap(runner, "call_and_report", "{1}")
    wrap(inside._Visit, "_set_up_outside", "set up what is of a wider scope")
    wrap(Session, "request", "ask the launcher: {1}")
    wrap(enter, "_fork_directly", "fork")
    wrap(processes, "die_with", "die with pytest (prctl)")
    wrap(libc, "setns", "enter namespaces (setns)")
    wrap(Confinement, "apply", "capabilities, seccomp")
    wrap(body.Body, "_begin", "prepare the hooks of a body")
    wrap(body.Body, "_say", "tell pytest: {1}; and wait")
    wrap(inside._Visit, "_log", "log a report")
    wrap(inside._Visit, "leave", "have the body and its container ended")


_CREATION = "Session.container()"
_ONE_TEST = "one test, of 20 ms"
_TESTS = """
import time, pytest

@pytest.mark.sandbox(cpus=1, memory="256M", pids=100)
@pytest.mark.parametrize("n", range({}))
def test_it(n):
    time.sleep(0.02)
"""


def _trace_inside(runs: int) -> list[list[Note]]:
    """The notes of each test, in order, counted from its beginning."""
    with tempfile.TemporaryDirectory(prefix="nsbox-trace-", dir=_MEMORY) as directory:
        notes = os.path.join(directory, "notes")
        Notes(notes).start()
        Path(directory, "test_it.py").write_text(_TESTS.format(runs))
        path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, _FILE: notes, "PYTHONPATH": path}
        env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        plugins = ["-p", "pytest_nsbox.plugin", "-p", "trace", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *plugins, directory]
        subprocess.run(command, env=env, cwd=directory, check=True, stdout=subprocess.DEVNULL)
        found = Notes(notes).read()
    tests = [note for note in found if note.what == _ONE_TEST]
    return [
        [
            Note(note.began - test.began, note.ended - test.began, note.who, note.what)
            for note in found
            if test.began <= note.began and note.ended <= test.ended
        ]
        for test in tests[runs // 5 :]
    ]


def _many_descriptors() -> None:
    """A session holds a few for each container."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of one creation, or test, goes.")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--pool", type=int, default=0, help="so many made ahead (default: none)")
    parser.add_argument("--least", type=float, default=0, metavar="MS", help="leave out the rest")
    parser.add_argument("--alive", type=int, default=0, help="beside so many (default: none)")
    parser.add_argument("--rootfs", help="of this (default: the host's)")
    parser.add_argument("--run", action="store_true", help="a command in a running container")
    parser.add_argument("--inside", action="store_true", help="a test inside, with its body")
    options = parser.parse_args()
    rows: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    if options.inside:
        traces = _trace_inside(options.runs)
    else:
        _many_descriptors()
        traces = _trace(options.runs, options.pool, options.alive, options.run, options.rootfs)
    for trace in traces:
        seen: dict[tuple[str, str], int] = {}
        for note in trace:
            key = (note.who, note.what)
            seen[key] = seen.get(key, 0) + 1
            rows.setdefault((*key, seen[key]), []).append((note.began, note.ended - note.began))
    table = []
    for (who, what, _), times in rows.items():
        if len(times) > len(traces) // 2:
            began, took = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
            if took >= options.least:
                table.append((began, took, who, what))
    print("| from ms | took ms | who | what |\n| --: | --: | --- | --- |")
    for began, took, who, what in sorted(table):
        print(f"| {began:.2f} | {took:.2f} | {who} | `{what}` |")


if __name__ == "__main__":
    if _FILE in os.environ:
        _launch()
    else:
        main()
