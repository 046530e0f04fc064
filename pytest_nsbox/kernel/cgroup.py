"""Control groups, of either version, behind one interface (cgroups(7)).

A driver makes one directory per session, `nsbox-SESSION`, below a cgroup that is ours to divide,
and beneath it one directory per container; on v1 in every hierarchy that is used.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Protocol

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel import cgroup_files as files
from pytest_nsbox.kernel.cgroup_v1 import DriverV1
from pytest_nsbox.kernel.cgroup_v2 import DriverV2, place
from pytest_nsbox.kernel.mountinfo import unescape
from pytest_nsbox.model.limits import Limits, Stats

_V1_CONTROLLERS = {"cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "freezer"}
_V2_CONTROLLERS = {"cpu", "memory", "pids"}


class Cgroup(Protocol):
    """The cgroup of one container."""

    def attach(self, pid: int) -> None:
        """Move a process in, in every hierarchy used; 0 is the calling process."""

    def procs_files(self) -> list[str]:
        """The files by which a process of one thread enters: it writes "0" to each.

        An `update` or `freeze` on v1 may add one, so ask anew for each entry.
        """

    def hierarchies(self) -> dict[str, str]:
        """Its directories: v1's by the mount option ("cpu,cpuacct") of each hierarchy used; v2's
        by an empty name."""

    def update(self, limits: Limits) -> None:
        """Change the limits that are not None. `memory` alone leaves the limit on swap.

        `memory` below what is in use: v2 makes room by killing, v1 refuses (EBUSY).
        """

    def stats(self) -> Stats: ...

    def oom_kills(self) -> int:
        """Processes killed for want of memory so far; makes `oom_event_fd` wait anew."""

    def oom_event_fd(self) -> int | None:
        """A descriptor, the caller's to close, readable when memory has run out.

        It may also be readable when nobody was killed (v2: at the limit, but something could be
        reclaimed), so ask `oom_kills`, which also takes the event. None: no memory controller.
        """

    def freeze(self) -> None:
        """Stop every process; returns when they stand still."""

    def thaw(self) -> None: ...

    def kill(self) -> None:
        """SIGKILL to every process, frozen or not. Does not wait for their end."""

    def members(self) -> set[int]:
        """The processes in it, as this PID namespace counts."""

    def remove(self, *, patient: bool = True) -> None:
        """Remove every directory; waits, if `patient`, for who is about to end. Again is fine."""


class Driver(Protocol):
    """Where the cgroups of one session are."""

    version: int

    def describe(self) -> str:
        """One line for a report: "cgroup v1: cpu cpuset memory pids freezer"."""

    def available(self) -> frozenset[str]:
        """Which there are of: cpu cpuset memory swap pids io freezer."""

    def session_paths(self) -> list[str]:
        """Every directory of the session itself that any container may need."""

    def paths(self, name: str, limits: Limits | None = None) -> list[str]:
        """Every directory that `create` and later `update` and `freeze` may make, deepest last.

        Directories of the session are among them until they are there.
        """

    def create(self, name: str, limits: Limits, io_device: str | None = None) -> Cgroup:
        """Make a cgroup. Nothing of it is left when that fails.

        `memory` without `swap` means no swap. `io_device` is "major:minor" of what `io` is about;
        on v1 the kernel throttles only reads and direct or synchronous writes.
        Raises UnsupportedError for a limit that cannot be kept here, else OSError.
        """

    def close(self) -> None:
        """Remove the session's own directories; again is fine."""


@dataclass(frozen=True)
class _Mount:
    """A cgroup mount in which our own cgroup is visible."""

    version: int
    options: tuple[str, ...]  # on v1 the controllers are among them
    point: str
    own: str  # the directory of our own cgroup

    def writable(self) -> bool:
        return os.access(self.own, os.W_OK | os.X_OK)


def detect(session: str) -> Driver:
    """The cgroups of this host as the calling process may use them.

    v2 if it has the controllers that matter, else v1, which on hybrid hosts has them.
    Makes nothing before the first `create`. Raises UnsupportedError if no cgroup can be written.
    """
    name = f"nsbox-{session}"
    mounts = _mounts()
    v2 = next((mount for mount in mounts if mount.version == 2), None)
    if v2 and _V2_CONTROLLERS & set(files.read(v2.point + "/cgroup.controllers").split()):
        return DriverV2(name, place(v2.point, v2.own))
    v1 = [mount for mount in mounts if mount.version == 1]
    parents: dict[str, str] = {}
    for mount in filter(_Mount.writable, v1):
        for controller in _V1_CONTROLLERS.intersection(mount.options):
            parents.setdefault(controller, mount.own)
    if parents:
        return DriverV1(name, parents)
    # beside v1's controllers a mount of v2 has none, and is not what would have to be writable
    if v2 and not any(_V1_CONTROLLERS.intersection(mount.options) for mount in v1):
        return DriverV2(name, place(v2.point, v2.own))
    raise UnsupportedError(
        "no cgroup can be written: "
        + ("those mounted are read-only or another user's" if mounts else "none is mounted")
        + "; run as root, or give the container a writable /sys/fs/cgroup (docker run --privileged)"
    )


def _mounts() -> list[_Mount]:
    own: dict[str, str] = {}  # by controller; "" is v2
    for line in files.read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    found = []
    for line in files.read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        root, point = (unescape(field) for field in left.split()[3:5])
        fstype, _, options = right.split(maxsplit=2)
        if fstype not in ("cgroup", "cgroup2"):
            continue
        version = 2 if fstype == "cgroup2" else 1
        names = tuple(options.split(","))
        keys = ("",) if version == 2 else names
        ours = next((own[key] for key in keys if key in own), None)
        directory = None if ours is None else _below(point, root, ours)
        # A mount may be hidden by a later one, so look.
        if directory and os.path.exists(directory + "/cgroup.procs"):
            found.append(_Mount(version, names, point, directory))
    return found


def _below(point: str, root: str, path: str) -> str | None:
    """Where a mount at `point` of the cgroup `root` shows the cgroup `path`; None: nowhere.

    A bind mount has a root of its own, and seen from a cgroup namespace roots outside it
    start with "/..".
    """
    if path == root:
        return point
    if ".." in path.split("/") or not path.startswith(root.rstrip("/") + "/"):
        return None
    return f"{point}/{path[len(root.rstrip('/')) + 1 :]}"


def remove_tree(path: str) -> None:
    """Kill what is left in a cgroup and below it, and remove the directories, deepest first.

    Missing is fine. Raises OSError (EINVAL) for a directory that is not a cgroup's.
    """
    if not os.path.lexists(path):
        return
    if not os.path.exists(path + "/cgroup.procs"):
        raise OSError(errno.EINVAL, f"remove {path}: not a cgroup")
    files.kill_tree(path)
    _thaw_tree(path)
    files.rmdir(path)


def _thaw_tree(path: str) -> None:
    """On v1 a frozen process does not die before it is thawed."""
    if os.path.exists(path + "/freezer.state"):
        files.write(path + "/freezer.state", "THAWED")
        for child in files.children(path):
            _thaw_tree(child)
