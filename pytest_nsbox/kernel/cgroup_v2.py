"""cgroup v2: one hierarchy (Documentation/admin-guide/cgroup-v2.rst).

A cgroup that hands controllers down may hold no process itself, except the real root. So the
session is put below the nearest cgroup that may be written and holds none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import time
from dataclasses import dataclass

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel import cgroup_files as files
from pytest_nsbox.model.limits import Limits, Stats

_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io")
_CONTROLLER_OF = {"cpus": "cpu", "swap": "memory"}
_ALWAYS = ("memory", "pids")  # these count, limits or none; cpu time is counted without
_LEAF = "nsbox-main"


@dataclass(frozen=True)
class Place:
    """Where in the hierarchy sessions are put."""

    base: str  # the cgroup that holds them
    top: str  # the highest one in which we may hand controllers down to it
    offered: frozenset[str]  # the controllers that may be handed down
    crowded: bool  # the base's own processes must be moved out first, unless they have been
    shared: bool  # the base is a container's own root, which other sessions divide as well


class DriverV2:
    version = 2

    def __init__(self, name: str, place: Place) -> None:
        self.path = f"{place.base}/{name}"
        self._place = place
        self._enabled: set[str] = set()
        self._made = False
        self._lock = -1  # on the base, as long as it must stay divided for us

    def describe(self) -> str:
        available = self.available()
        return " ".join(["cgroup v2:", *(name for name in files.FEATURES if name in available)])

    def available(self) -> frozenset[str]:
        names = self._place.offered.intersection(_CONTROLLERS) | {"freezer"}
        # The file that tells is in a cgroup below; a kernel without swap has no /proc/swaps.
        if "memory" in names and os.path.exists(
            f"{self.path}/memory.swap.max" if "memory" in self._enabled else "/proc/swaps"
        ):
            names |= {"swap"}
        return frozenset(names)

    def session_paths(self) -> list[str]:
        return [self.path]

    def paths(self, name: str, limits: Limits | None = None) -> list[str]:
        return [*([] if self._made else [self.path]), f"{self.path}/{name}"]

    def create(self, name: str, limits: Limits, io_device: str | None = None) -> CgroupV2:
        self.enable(limits)
        cgroup = CgroupV2(self, f"{self.path}/{name}", io_device)
        with contextlib.ExitStack() as undo:
            files.mkdir(cgroup.path)
            undo.callback(cgroup.remove)
            cgroup.apply(limits)
            undo.pop_all()
        return cgroup

    def enable(self, limits: Limits) -> None:
        """Hand the controllers that `limits` needs down to the session's cgroups.

        They stay enabled above the session: a neighbour may have come to use them.
        """
        wanted = {name for name in _ALWAYS if name in self._place.offered}
        for keyword, value in vars(limits).items():
            if value is not None:
                wanted.add(_CONTROLLER_OF.get(keyword, keyword))
        self._check(limits)
        if self._made and wanted <= self._enabled:
            return
        if self._place.crowded and not self._made:
            self._make_room()
        for directory in self._chain():
            _hand_down(directory, wanted)
        if not self._made:
            files.mkdir(self.path, exist_ok=True)
            self._made = True
        _hand_down(self.path, wanted)
        self._enabled |= wanted
        self._check(limits)

    def _chain(self) -> list[str]:
        chain = [self._place.base]
        while chain[0] != self._place.top:
            chain.insert(0, os.path.dirname(chain[0]))
        return chain

    def _check(self, limits: Limits) -> None:
        files.check_features(
            limits,
            self.available(),
            "the {} controller of cgroup v2 is not handed down to this process",
            "run as root, or have it delegated (systemd: Delegate=yes, and "
            "user@.service.d/delegate.conf for cpuset and io)",
        )

    def _make_room(self) -> None:
        """Move all processes of a container's own root cgroup, us among them, to a leaf."""
        base = self._place.base
        if self._place.shared:
            self._lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        if files.pids(base):
            files.mkdir(f"{base}/{_LEAF}", exist_ok=True)
            files.move_all(base, f"{base}/{_LEAF}", leave=True)

    def _give_room_back(self) -> None:
        """Undo that, when no other session and nobody else needs it."""
        base, leaf = self._place.base, f"{self._place.base}/{_LEAF}"
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if files.children(base) != [leaf]:
            return
        control = base + "/cgroup.subtree_control"
        if controllers := files.read(control).split():
            files.write(control, " ".join(f"-{name}" for name in controllers))
        files.move_all(leaf, base, leave=True)
        files.rmdir(leaf)

    def close(self) -> None:
        if self._made:
            files.rmdir(self.path)
            self._made = False
            self._enabled.clear()
        if self._lock >= 0:
            # another session's lock, or a process that cannot be moved: it stays for the next
            with contextlib.suppress(OSError):
                self._give_room_back()
            os.close(self._lock)
            self._lock = -1


def _hand_down(directory: str, controllers: set[str]) -> None:
    file = directory + "/cgroup.subtree_control"
    if missing := controllers.difference(files.read(file).split()):
        files.write(file, " ".join(f"+{name}" for name in sorted(missing)))


def place(mount: str, own: str) -> Place:
    """Where sessions go, in the hierarchy mounted at `mount`, with our own cgroup at `own`.

    Raises UnsupportedError if there is no such place.
    """
    base, crowded = _choose_base(mount, own)
    top = base
    while top != mount and _may_hold_cgroups(os.path.dirname(top)):
        top = os.path.dirname(top)
    offered = frozenset(files.read(top + "/cgroup.controllers").split())
    is_real_root = not os.path.exists(base + "/cgroup.type")
    shared = base == mount and not is_real_root
    return Place(base, top, offered, crowded or shared, shared)


def _choose_base(mount: str, own: str) -> tuple[str, bool]:
    """The cgroup to put sessions in, and whether its processes must be moved out first."""
    if _is_our_scope(own) and _writable(own):
        return own, True
    directory = own
    while not _may_hold_cgroups(directory):
        if directory == mount:
            break
        directory = os.path.dirname(directory)
    else:
        return directory, False
    # In a container with a cgroup namespace all that is in our cgroup is the container's;
    # elsewhere the processes beside us are others' and stay where they are.
    is_namespace_root = "0::/" in files.read("/proc/self/cgroup").splitlines()
    if is_namespace_root and os.geteuid() == 0 and own == mount and _writable(own):
        return own, True
    raise UnsupportedError(
        f"the cgroup {own} may not be divided: it and those above hold processes or are another "
        "user's; start with systemd-run --user --scope -p Delegate=yes, in a service set "
        "Delegate=yes and DelegateSubgroup=main, in a container mount /sys/fs/cgroup writable"
    )


def _is_our_scope(directory: str) -> bool:
    """Whether it was made for us and holds nobody else (launcher/scope.py)."""
    name = os.path.basename(directory)
    return name.startswith("nsbox-") and name.endswith(".scope")


def _writable(directory: str) -> bool:
    return all(
        os.access(directory + file, os.W_OK)
        for file in ("", "/cgroup.procs", "/cgroup.subtree_control")
    )


def _may_hold_cgroups(directory: str) -> bool:
    is_real_root = not os.path.exists(directory + "/cgroup.type")
    return _writable(directory) and (is_real_root or not files.pids(directory))


class CgroupV2:
    def __init__(self, driver: DriverV2, path: str, io_device: str | None) -> None:
        self.path = path
        self._driver = driver
        self._io_device = io_device
        self._memory_limited = False
        self._oom_events = -1

    def attach(self, pid: int) -> None:
        files.write(self.path + "/cgroup.procs", str(pid))

    def procs_files(self) -> list[str]:
        return [self.path + "/cgroup.procs"]

    def hierarchies(self) -> dict[str, str]:
        return {"": self.path}

    def update(self, limits: Limits) -> None:
        self._driver.enable(limits)
        self.apply(limits)

    def apply(self, limits: Limits) -> None:
        swap = limits.swap
        if limits.memory is not None and swap is None and not self._memory_limited:
            swap = 0 if "swap" in self._driver.available() else None
        if swap is not None:  # first, or lowering memory would fill the swap
            files.write(self.path + "/memory.swap.max", str(swap))
        if limits.memory is not None:
            if not self._memory_limited:
                files.write(self.path + "/memory.oom.group", "1")
            files.write(self.path + "/memory.max", str(limits.memory))
            self._memory_limited = True
        if limits.pids is not None:
            files.write(self.path + "/pids.max", str(limits.pids))
        if limits.cpus is not None:
            quota, period = files.bandwidth(limits.cpus)
            files.write(self.path + "/cpu.max", f"{quota} {period}")
        if limits.cpuset is not None:
            there = files.read(self._driver.path + "/cpuset.cpus.effective").strip()
            files.check_cores(limits.cpuset, there)
            files.write(self.path + "/cpuset.cpus", limits.cpuset)
        if limits.io is not None:
            disk = files.whole_disk(dict(limits.io), self._io_device)
            values = " ".join(f"{key}={value}" for key, value in limits.io.items())
            files.write(self.path + "/io.max", f"{disk} {values}")

    def stats(self) -> Stats:
        cpu = files.read_table(self.path + "/cpu.stat")
        throttled = cpu.get("throttled_usec")
        limit = self._value("memory.max")
        memory = self._value("memory.current")
        if memory is None:
            memory = files.resident(files.pids(self.path))
        members = self._value("pids.current")
        if members is None:
            members = len(files.read(self.path + "/cgroup.threads").split())
        return Stats(
            cpu=cpu["usage_usec"] / 1e6,
            throttled=None if throttled is None else throttled / 1e6,
            memory=memory,
            memory_peak=self._value("memory.peak"),  # Linux 5.19
            memory_limit=limit,
            pids=members,
            oom_kills=self._oom_count(),
        )

    def _value(self, file: str) -> int | None:
        """A number; None for "max", or where there is no such file but there is the cgroup."""
        try:
            text = files.read(f"{self.path}/{file}").strip()
        except FileNotFoundError:
            return None
        return None if text == "max" else int(text)

    def oom_kills(self) -> int:
        if self._oom_events < 0:
            return self._oom_count()
        text = os.pread(self._oom_events, 4096, 0).decode()  # arms the event anew
        return _kills(files.parse_table(text))

    def _oom_count(self) -> int:
        """By a descriptor of its own, so that the event stays for who waits for it."""
        try:
            return _kills(files.read_table(self.path + "/memory.events"))
        except FileNotFoundError:
            if os.path.exists(self.path):
                return 0  # no memory controller
            raise

    def oom_event_fd(self) -> int | None:
        """Such a file is always readable and tells of a change by POLLPRI, so what is handed out
        is an epoll(7) descriptor that waits for that, and is itself readable then."""
        if self._oom_events < 0:
            try:
                self._oom_events = os.open(self.path + "/memory.events", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            self.oom_kills()  # until the first read, a change would be reported
        with select.epoll() as epoll:
            epoll.register(self._oom_events, select.EPOLLPRI)
            return os.dup(epoll.fileno())

    def freeze(self) -> None:
        files.write(self.path + "/cgroup.freeze", "1")
        if not files.wait_event(self.path, "frozen", 1, time.monotonic() + files.PATIENCE):
            self.thaw()
            raise OSError(errno.ETIMEDOUT, f"freeze {self.path}: some process does not stop")

    def thaw(self) -> None:
        files.write(self.path + "/cgroup.freeze", "0")

    def kill(self) -> None:
        files.kill_tree(self.path)

    def members(self) -> set[int]:
        return files.pids(self.path)

    def remove(self, *, patient: bool = True) -> None:
        if self._oom_events >= 0:
            os.close(self._oom_events)
            self._oom_events = -1
        files.rmdir(self.path, files.PATIENCE if patient else 0)


def _kills(events: dict[str, int]) -> int:
    """A kill of the group counts its first process twice: by itself, and as one of the group."""
    kills = events["oom_kill"]
    return max(min(kills, 1), kills - events.get("oom_group_kill", 0))  # counted from Linux 5.17
