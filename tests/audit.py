"""What a run could leave behind, listed and compared."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import select
import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path

MARK = "NSBOX_TEST_RUN"
# an emulated machine is that slow; and a body orphaned by its pytest is reaped by the machine's
# init, when that pleases, before which its container cannot end (pid_namespaces(7))
GRACE = 40.0 if os.environ.get("RUN_IN_V2") else 10.0
os.environ[MARK] = str(os.getpid())


def _output(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _links() -> set[str]:
    # the counters of addresses' lifetimes and the like are not in the brief form
    return set(_output("ip", "-brief", "link")) | set(_output("ip", "-brief", "address"))


def _ahead(directory: str) -> str:
    """Whose next init a process is, if it is one: there is another one after each container."""
    stat = Path(directory, "stat").read_text()
    parent = stat.rpartition(")")[2].split()[1]
    return f"the one ahead of {parent}" if "(nsbox-ahead)" in stat else ""


def _namespaces() -> set[str]:
    """Every namespace that a process or a mount holds."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/ns/*"):
        try:
            found.add(_ahead(os.path.dirname(os.path.dirname(path))) or os.readlink(path))
        except OSError:
            continue
    return found | {
        line.split()[3]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if " nsfs " in line
    }


def _mounts() -> set[str]:
    return {line.split(" ", 1)[1] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def _cgroups() -> set[str]:
    return {path for path, _, _ in os.walk("/sys/fs/cgroup") if "nsbox" in path}


def _rules() -> set[str]:
    return set(_output("nft", "list", "ruleset"))


def _processes() -> set[str]:
    """Those that descend from this run, whoever their parent is now: they have its mark."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = set()
    for path in glob.glob("/proc/[0-9]*"):
        try:
            environment = Path(path, "environ").read_bytes()
            command = Path(path, "cmdline").read_bytes().replace(b"\0", b" ").decode()
            ahead = _ahead(path)
        except OSError:
            continue
        if mark in environment.split(b"\0"):
            found.add(ahead or f"{Path(path).name} {command}")
    return found


def _sysctls() -> set[str]:
    found = set()
    paths = glob.glob("/proc/sys/net/ipv[46]/conf/*/*forwarding")
    for path in [*paths, "/proc/sys/net/ipv4/ip_forward"]:
        with contextlib.suppress(FileNotFoundError):  # its device has just gone
            found.add(f"{path} {Path(path).read_text().strip()}")
    return found


def _routes() -> set[str]:
    # what a router has advertised counts down
    lines = _output("ip", "route", "show", "table", "all")
    return {re.sub(r" expires \d+sec", "", line) for line in lines}


def _files() -> set[str]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    roots = ["/run/nsbox", cache + "/nsbox/writable"]
    found = set()
    for root in roots:
        found |= set(glob.glob(root + "/**", recursive=True))
    return found - {root + "/" for root in roots} - set(roots[1:])


@dataclass
class Snapshot:
    """Sets of lines, one set for each kind of thing."""

    links: set[str]
    namespaces: set[str]
    mounts: set[str]
    cgroups: set[str]
    rules: set[str]
    processes: set[str]
    sysctls: set[str]
    routes: set[str]
    files: set[str]

    def added_in(self, later: Snapshot) -> list[str]:
        """What `later` has more; for what belongs to the host itself, also what it lacks."""
        found = []
        for field in fields(self):
            before, after = getattr(self, field.name), getattr(later, field.name)
            found += [f"{field.name}: + {line}" for line in sorted(after - before)]
            if field.name not in ("namespaces", "processes", "files", "cgroups"):
                found += [f"{field.name}: - {line}" for line in sorted(before - after)]
        return found

    def must_equal_soon(self, grace: float = GRACE) -> None:
        """Fail for what is still there after `grace` seconds: who was orphaned needs a moment,
        and for the end of a stranger's child there is no event."""
        deadline = time.monotonic() + grace
        while True:
            left = self.added_in(take())
            if not left:
                return
            if time.monotonic() > deadline:
                raise AssertionError("left behind:\n" + "\n".join(left))
            select.select([], [], [], 0.02)


def take() -> Snapshot:
    """What there is now."""
    return Snapshot(
        _links(),
        _namespaces(),
        _mounts(),
        _cgroups(),
        _rules(),
        _processes(),
        _sysctls(),
        _routes(),
        _files(),
    )
