"""What sessions have on this machine now, and whose it is.

Everything of a session can be told from others': its processes carry a mark in their environment,
its ledger, cgroups and layers are named after its launcher. Its links, nft tables and namespaces
are held by its processes: the kernel removes them with the last of these.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_nsbox import wire
from pytest_nsbox.kernel import listing, processes
from pytest_nsbox.launcher import ledger

_OWNER = re.compile(r"(?:nsbox-)?([0-9a-f]{8})-(\d+)-(\d+)(?:-\d+)?")
MODULE = "pytest_nsbox.launcher"


@dataclass(frozen=True)
class Found:
    """One thing that a session has made: what it is, which, and whose."""

    kind: str
    what: str
    owner: int  # pid of the session's launcher, 0 where that cannot be told
    alive: bool  # whether that launcher is

    def __str__(self) -> str:
        whose = f"session {self.owner}" if self.owner else "a session"
        return f"{self.kind} {self.what} ({whose}, {'alive' if self.alive else 'ended'})"


def audit(cache: Path) -> list[Found]:
    """Everything, of the living and of the dead, `cache` being where layers are."""
    mine = list(_processes())
    launchers = {each.owner for each in mine}
    found = [
        *mine,
        *_cgroups(),
        *_ledgers(cache),
        *_layers(cache),
        *_mounts(cache),
        *_network(launchers),
        *_sysctls(),
    ]
    return sorted(found, key=lambda each: (each.alive, each.owner, each.kind, each.what))


def _is_alive(boot: str, pid: int, start: int) -> bool:
    return ledger.boot_id().startswith(boot) and ledger.start_time(pid) == start


def _named(kind: str, name: str, what: str) -> Iterator[Found]:
    """A thing whose name has its owner."""
    if match := _OWNER.fullmatch(name):
        boot, pid, start = match[1], int(match[2]), int(match[3])
        yield Found(kind, what, pid, _is_alive(boot, pid, start))


def _processes() -> Iterator[Found]:
    """Launchers and what descends from them, whoever is the parent now."""
    launchers: dict[str, int] = {}
    marked: list[tuple[processes.Process, str]] = []
    for process in processes.all_of_them():
        if process.state in "ZX":
            continue
        for variable in processes.variables(process.pid):
            name, _, mark = variable.partition("=")
            if name == wire.MARK:
                marked.append((process, mark))
                if _is_launcher(process.pid):
                    launchers[mark] = min(process.pid, launchers.get(mark, process.pid))
    for process, mark in marked:
        owner = launchers.get(mark, 0)
        yield Found("process", f"{process.pid} {process.name}", owner, bool(owner))


def _is_launcher(pid: int) -> bool:
    """Its children are forks with its command line, and have names of their own."""
    process = processes.find(pid)
    if process is None or process.name.startswith("nsbox-"):
        return False
    try:
        return MODULE in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (OSError, ValueError):
        return False


def _cgroups() -> Iterator[Found]:
    for point in _mount_points("cgroup", "cgroup2"):
        for path, directories, _ in os.walk(point):
            for name in directories:
                yield from _named("cgroup", name, f"{path}/{name}")
            directories[:] = [name for name in directories if not _OWNER.fullmatch(name)]


def _ledgers(cache: Path) -> Iterator[Found]:
    for directory in (ledger.state_directory(), ledger.layers_directory(cache)):
        for path in sorted(directory.glob("*-*-*")):
            yield from _named("ledger", path.name, str(path))


def _layers(cache: Path) -> Iterator[Found]:
    for path in sorted((cache / "writable").glob("*-*-*-*")):
        yield from _named("layer", path.name, str(path))


def _network(launchers: set[int]) -> Iterator[Found]:
    """Uplinks and their tables in this network namespace: their names have their launcher's
    number."""
    with contextlib.suppress(OSError):  # an ordinary user may not list rules
        for line in [*listing.links(), *listing.rules()]:
            kind, *_ = line.split()
            for match in re.finditer(r"\bnsbox(\d+)-[0-9a-f]{2}\b", line):
                if kind.isdigit() or kind == "table":
                    owner = int(match[1])
                    kind = "link" if kind.isdigit() else "nft table"
                    yield Found(kind, match[0], owner, owner in launchers)


def _sysctls() -> Iterator[Found]:
    """What sessions have set and are to put back, by their ledgers."""
    for path in sorted(ledger.state_directory().glob("*-*-*")):
        for what in ledger.sysctls_in(path):
            yield from _named("sysctl", path.name, what)


def _mounts(cache: Path) -> Iterator[Found]:
    """An overlay on a session's layer that has got out of its container."""
    for point in _mount_points():
        if point.startswith(f"{cache}/writable/"):
            yield from _named("mount", Path(point).name, point)


def _mount_points(*fstypes: str) -> list[str]:
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if not fstypes or after.split(" ", 1)[0] in fstypes:
                found.append(before.split(" ")[4])
    return found


def left_by_this(cache: Path) -> list[str]:
    """What the launcher that calls this still has; it should be nothing but itself."""
    own = os.getpid()
    return [
        f"{each.kind} {each.what}"
        for each in audit(cache)
        if each.owner == own and not (each.kind == "process" and each.what.split()[0] == str(own))
    ]


def left(found: Iterable[Found]) -> list[Found]:
    """What no living session owns."""
    return [each for each in found if not each.alive]
