"""What a run could leave behind, listed and compared."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from pytest_nsbox.kernel import listing, processes
from pytest_nsbox.kernel.namespaces import Home
from pytest_nsbox.launcher import ledger

MARK = "NSBOX_TEST_RUN"
# an emulated machine is that slow; and a body orphaned by its pytest is reaped by the machine's
# init, when that pleases, before which its container cannot end (pid_namespaces(7))
_ADDED_LATER = re.compile(r"fe80:|ff00::/8")
GRACE = 40.0 if os.environ.get("RUN_IN_V2") else 10.0
_MOMENT = 0.5  # seconds
os.environ[MARK] = str(os.getpid())


def _pids() -> set[int]:
    """Everybody, but who is forked ahead of the next container of a living session."""
    everybody = {process.pid: process for process in processes.all_of_them()}
    return {
        pid
        for pid, process in everybody.items()
        if process.name != "nsbox-ahead"
        or getattr(everybody.get(process.parent), "name", "") != "nsbox-zygote"
    }


def _reachable(kind: str) -> dict[str, str]:
    """Every namespace of a kind that has a process or a name, and a path to it."""
    found: dict[str, str] = {}
    named = glob.glob("/run/netns/*") if kind == "net" else []
    for path in [*(f"/proc/{pid}/ns/{kind}" for pid in _pids()), *named]:
        with contextlib.suppress(OSError):
            found.setdefault(f"{kind}:[{os.stat(path).st_ino}]", path)
    return found


def _namespaces() -> set[str]:
    """Every namespace that a process or a mount holds."""
    found = set()
    for pid in _pids():
        for path in glob.glob(f"/proc/{pid}/ns/*"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(path))
    return found | {
        line.split()[3]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if " nsfs " in line
    }


def _network() -> dict[str, set[str]]:
    """What is in every network namespace that can be reached."""
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "links": listing.links,
        "addresses": listing.addresses,
        "routes": listing.routes,
        "rules": listing.rules,
        "sysctls": listing.forwarding,
    }
    found: dict[str, set[str]] = {name: set() for name in parts}
    own = f"net:[{os.stat('/proc/self/ns/net').st_ino}]"
    for namespace, path in _reachable("net").items():
        with contextlib.suppress(OSError):  # it has just gone
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with Home(["net"]) as home, home.away({"net": fd}):
                    for name, lines in parts.items():
                        where = "" if namespace == own else f" in {namespace}"
                        # link-local ones come by themselves, a while after a link is up
                        theirs = {line for line in lines() if not _ADDED_LATER.search(line)}
                        found[name] |= {line + where for line in theirs}
            finally:
                os.close(fd)
    return found


def _mounts() -> set[str]:
    """Every mount of every mount namespace that can be reached."""
    found = set()
    own = f"mnt:[{os.stat('/proc/self/ns/mnt').st_ino}]"
    for namespace, path in _reachable("mnt").items():
        where = "" if namespace == own else f" in {namespace}"
        with contextlib.suppress(OSError):
            text = Path(path).parent.parent.joinpath("mountinfo").read_text(errors="replace")
            found |= {line.split(" ", 1)[1] + where for line in text.splitlines()}
    return found


def _cgroups() -> set[str]:
    """All but those that are made ahead for the next container of a living session."""
    found = {path for path, _, _ in os.walk("/sys/fs/cgroup") if "nsbox" in path}
    ahead = _last({_tail(path) for path in found}) & set(map(_tail, filter(_is_untouched, found)))
    return {path for path in found if _tail(path) not in ahead}


def _tail(path: str) -> str:
    """A container's cgroup, the same in all hierarchies."""
    return "/".join(path.split("/")[-2:])


def _last(names: set[str]) -> set[str]:
    """Of things that are named after living sessions and numbered, the last of each session."""
    numbered: dict[str, tuple[int, str]] = {}
    for name in names:
        parts = re.fullmatch(r"(?:.*nsbox-)?([0-9a-f]{8}-\d+-\d+)(?:/c|-)(\d+)", name)
        if parts and _lives(parts[1]):
            numbered[parts[1]] = max(numbered.get(parts[1], (0, "")), (int(parts[2]), name))
    return {name for _, name in numbered.values()}


def _is_untouched(path: str) -> bool:
    """Whether no process has ever run in a cgroup, where that is counted."""
    with contextlib.suppress(OSError):
        return Path(path, "cpuacct.usage").read_text() == "0\n"
    with contextlib.suppress(OSError):
        return Path(path, "cpu.stat").read_text().startswith("usage_usec 0\n")
    return False


def _lives(name: str) -> bool:
    """Whether the launcher lives that a session is named after."""
    _, pid, start = name.split("-")
    return ledger.start_time(int(pid)) == int(start)


def _processes() -> set[str]:
    """Those that descend from this run, whoever their parent is now: they have its mark."""
    mark = f"{MARK}={os.environ[MARK]}"
    found = set()
    for pid in _pids():
        if mark in processes.variables(pid):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                found.add(f"{pid} {command.decode(errors='replace')}")
    return found


def _parent(line: str) -> str:
    """Who the parent of a process is now, as the end of its line."""
    process = processes.find(int(line.split()[0]))
    parent = process and processes.find(process.parent)
    return f" (child of {parent.pid} {parent.name})" if parent else ""


def _files() -> set[str]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    roots = ["/run/nsbox", cache + "/nsbox/writable", cache + "/nsbox/writable.ledgers"]
    found = set()
    for root in roots:
        found |= set(glob.glob(root + "/**", recursive=True))
    layers = {os.path.basename(path): path for path in found if path.startswith(roots[1] + "/")}
    found -= {layers[name] for name in _last(set(layers)) if _is_empty(layers[name])}
    temporary = {path for top in ("/tmp", "/var/tmp") for path in glob.glob(top + "/*nsbox*")}
    return found - {root + "/" for root in roots} - set(roots[1:]) | temporary


def _is_empty(path: str) -> bool:
    with contextlib.suppress(OSError):
        return not os.listdir(path)
    return False


def _descriptors() -> set[str]:
    """Of this process: number and what it is, so that a new one in an old one's place is seen."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return {line for line in found if not line.endswith("/fd")}


def awake(seconds: float) -> Iterator[None]:
    """Turns for so long, but at least two. Of each at most a moment counts: while the machine, or
    this process, stood still, nobody has taken anything down either."""
    then = time.monotonic()
    yield
    while seconds > 0:
        yield
        now = time.monotonic()
        seconds -= min(now - then, _MOMENT)
        then = now


@dataclass
class Snapshot:
    """Sets of lines, one set for each kind of thing."""

    namespaces: set[str] = field(default_factory=_namespaces)
    mounts: set[str] = field(default_factory=_mounts)
    cgroups: set[str] = field(default_factory=_cgroups)
    processes: set[str] = field(default_factory=_processes)
    files: set[str] = field(default_factory=_files)
    descriptors: set[str] = field(default_factory=_descriptors)
    network: dict[str, set[str]] = field(default_factory=_network)

    def lines(self) -> dict[str, set[str]]:
        """By kind."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**own.pop("network"), **own}

    def added_in(self, later: Snapshot) -> list[str]:
        """What `later` has more; for what belongs to the host itself, also what it lacks."""
        found = []
        after = later.lines()
        for kind, before in self.lines().items():
            for line in sorted(after[kind] - before):
                found.append(f"{kind}: + {line}{_parent(line) if kind == 'processes' else ''}")
            if kind in ("links", "addresses", "routes", "rules", "sysctls", "mounts"):
                gone = {line for line in before - after[kind] if " in " not in line}
                found += [f"{kind}: - {line}" for line in sorted(gone)]
        return found

    def must_equal_soon(self, grace: float = GRACE) -> None:
        """Fail for what is still there after `grace` seconds: who was orphaned needs a moment,
        and for the end of a stranger's child there is no event."""
        left = []
        for _ in awake(grace):
            if not (left := self.added_in(take())):
                return
            select.select([], [], [], 0.02)
        raise AssertionError("left behind:\n" + "\n".join(left))


def take() -> Snapshot:
    """What there is now."""
    return Snapshot()
