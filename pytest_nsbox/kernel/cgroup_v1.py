"""cgroup v1: a hierarchy per controller, or per few (Documentation/admin-guide/cgroup-v1).

Every attach to a hierarchy waits for an RCU grace period, so a container is in as few as will do:
those that count (cpuacct, memory, pids), and the others from when a limit needs them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel import cgroup_files as files
from pytest_nsbox.kernel import libc
from pytest_nsbox.model.limits import Limits, Stats

_ALWAYS = ("cpuacct", "memory", "pids")
_CONTROLLER_OF = {"io": "blkio", "swap": "memory"}
_MEMSW = "memory.memsw.limit_in_bytes"
_UNLIMITED = 1 << 62  # what the kernel shows for "none" depends on its page size, and is above
_THROTTLE = {
    "rbps": "blkio.throttle.read_bps_device",
    "wbps": "blkio.throttle.write_bps_device",
    "riops": "blkio.throttle.read_iops_device",
    "wiops": "blkio.throttle.write_iops_device",
}
_UNTIL_KILLED = 0.25  # seconds; who runs the killer may be throttled for a period of 0.1
_ORDER = ("cpuacct", "cpu", "cpuset", "memory", "pids", "blkio", "freezer")


class DriverV1:
    """`parents`: by controller, the directory of our own cgroup in its hierarchy."""

    version = 1

    def __init__(self, name: str, parents: dict[str, str]) -> None:
        self.name = name
        self.parents = parents
        self._made: list[str] = []

    def describe(self) -> str:
        available = self.available()
        return " ".join(["cgroup v1:", *(name for name in files.FEATURES if name in available)])

    def available(self) -> frozenset[str]:
        names = {name for name in files.FEATURES if _CONTROLLER_OF.get(name, name) in self.parents}
        if "memory" in names and not os.path.exists(f"{self.parents['memory']}/{_MEMSW}"):
            names.discard("swap")
        return frozenset(names)

    def session_paths(self) -> list[str]:
        # The freezer is last, so the first when swept: what it holds cannot die before it thaws.
        parents = [self.parents[name] for name in _ORDER if name in self.parents]
        return [f"{parent}/{self.name}" for parent in dict.fromkeys(parents)]

    def paths(self, name: str, limits: Limits | None = None) -> list[str]:
        sessions = self.session_paths()
        new = [path for path in sessions if path not in self._made]
        return new + [f"{path}/{name}" for path in sessions]

    def create(self, name: str, limits: Limits, io_device: str | None = None) -> CgroupV1:
        self.check(limits)
        cgroup = CgroupV1(self, name, io_device)
        with contextlib.ExitStack() as undo:
            undo.callback(cgroup.remove)
            for controller in [c for c in _ALWAYS if c in self.parents] or [*self.parents][:1]:
                cgroup.use(controller)
            cgroup.apply(limits)
            undo.pop_all()
        cgroup.inhabited = True
        return cgroup

    def check(self, limits: Limits) -> None:
        files.check_features(
            limits,
            self.available(),
            "cgroup v1 has no {} controller here, or it may not be written",
            "mount it and run as root; for swap boot with swapaccount=1",
        )

    def session(self, controller: str) -> str:
        """The session's directory in the hierarchy of a controller, made when first needed."""
        path = f"{self.parents[controller]}/{self.name}"
        if path not in self._made:
            files.mkdir(path, exist_ok=True)
            self._made.append(path)
            self.prepare(path, self.parents[controller])
        return path

    def prepare(self, path: str, parent: str) -> None:
        """A new cpuset has no cores and no memory nodes, and takes no process before it has."""
        if path.startswith(self.parents.get("cpuset", "\0") + "/"):
            for file in ("cpuset.cpus", "cpuset.mems"):
                files.write(f"{path}/{file}", files.read(f"{parent}/{file}").strip())

    def close(self) -> None:
        while self._made:
            files.rmdir(self._made[-1])
            self._made.pop()


class CgroupV1:
    def __init__(self, driver: DriverV1, name: str, io_device: str | None) -> None:
        self.inhabited = False  # processes may be in it
        self._driver = driver
        self._name = name
        self._io_device = io_device
        self._paths: list[str] = []
        self._of: dict[str, str] = {}  # controller to its directory
        self._memory = self._memsw = _UNLIMITED
        self._period = files.PERIOD  # as the kernel has it in a new one
        self._oom_event = -1
        self._oom_seen = 0

    def use(self, controller: str) -> str:
        """The directory for a controller; a new one takes in who is in the container already."""
        if path := self._of.get(controller):
            return path
        session = self._driver.session(controller)
        path = f"{session}/{self._name}"
        if path not in self._paths:
            files.mkdir(path)
            self._paths.append(path)
            self._driver.prepare(path, session)
            if self.inhabited:
                files.move_all(self._paths[0], path)
        self._of[controller] = path
        return path

    def attach(self, pid: int) -> None:
        for path in self.procs_files():
            files.write(path, str(pid))

    def procs_files(self) -> list[str]:
        # by `tasks` a process of one thread moves itself without the lock on all thread groups,
        # which costs everybody an RCU grace period
        return [path + "/tasks" for path in self._paths]

    def hierarchies(self) -> dict[str, str]:
        by_parent: dict[str, list[str]] = {}
        for controller, parent in sorted(self._driver.parents.items()):
            by_parent.setdefault(parent, []).append(controller)
        suffix = f"/{self._driver.name}/{self._name}"
        return {",".join(by_parent[path.removesuffix(suffix)]): path for path in self._paths}

    def update(self, limits: Limits) -> None:
        self._driver.check(limits)
        self.apply(limits)

    def apply(self, limits: Limits) -> None:
        if limits.memory is not None or limits.swap is not None:
            self._limit_memory(limits.memory, limits.swap)
        if limits.pids is not None:
            files.write(self.use("pids") + "/pids.max", str(limits.pids))
        if limits.cpus is not None:
            self._limit_cpu(limits.cpus)
        if limits.cpuset is not None:
            files.check_cores(
                limits.cpuset, files.read(self._driver.session("cpuset") + "/cpuset.cpus").strip()
            )
            files.write(self.use("cpuset") + "/cpuset.cpus", limits.cpuset)
        if limits.io is not None:
            disk = files.whole_disk(dict(limits.io), self._io_device)
            for key, value in limits.io.items():
                files.write(f"{self.use('blkio')}/{_THROTTLE[key]}", f"{disk} {value}")

    def _limit_memory(self, memory: int | None, swap: int | None) -> None:
        path = self.use("memory")
        if memory is None:
            memory = self._memory
        if memory >= _UNLIMITED:
            raise UnsupportedError(
                f"swap={swap}: cgroup v1 limits memory and swap together; set memory, too"
            )
        if swap is None:
            swap = self._memsw - self._memory
        steps = [("memory.limit_in_bytes", memory)]
        if os.path.exists(f"{path}/{_MEMSW}"):
            # At no time may the limit on memory be above that on memory and swap.
            steps.insert(0 if memory > self._memsw else 1, (_MEMSW, memory + swap))
        for file, value in steps:
            try:
                files.write(f"{path}/{file}", str(value))
            except OSError as error:
                if error.errno != errno.EBUSY or file == _MEMSW:
                    raise
                # what was freed a moment ago may be counted still; this has the kernel look again
                with contextlib.suppress(OSError):
                    files.write(f"{path}/memory.force_empty", "0")
                files.write(f"{path}/{file}", str(value))
        self._memory, self._memsw = memory, memory + swap

    def _limit_cpu(self, cpus: float) -> None:
        path = self.use("cpu")
        quota, period = files.bandwidth(cpus)
        try:
            if period != self._period:  # to write it the kernel goes through all other groups
                files.write(path + "/cpu.cfs_period_us", str(period))
                self._period = period
            files.write(path + "/cpu.cfs_quota_us", str(quota))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise UnsupportedError(
                f"cpus={cpus:g}: the cgroup that this runs in is itself limited to less; "
                f"ask for less, or raise its limit ({error.strerror})"
            ) from error

    def stats(self) -> Stats:
        of = self._of
        throttled = peak = limit = None
        cpu = members = 0
        if "cpuacct" in of:
            cpu = files.read_int(of["cpuacct"] + "/cpuacct.usage")
        if "cpu" in of:
            throttled = files.read_table(of["cpu"] + "/cpu.stat")["throttled_time"] / 1e9
        if "memory" in of:
            memory = files.read_int(of["memory"] + "/memory.usage_in_bytes")
            peak = files.read_int(of["memory"] + "/memory.max_usage_in_bytes")
            limit = files.read_int(of["memory"] + "/memory.limit_in_bytes")
        else:
            memory = files.resident(files.pids(self._paths[0]))
        if "pids" in of:
            members = files.read_int(of["pids"] + "/pids.current")
        else:
            members = len(files.read(self._paths[0] + "/tasks").split())
        return Stats(
            cpu=cpu / 1e9,
            throttled=throttled,
            memory=memory,
            memory_peak=peak,
            memory_limit=None if limit is None or limit >= _UNLIMITED else limit,
            pids=members,
            oom_kills=self._oom_count(),
        )

    def _oom_count(self) -> int:
        if "memory" not in self._of:
            return 0
        return files.read_table(self._of["memory"] + "/memory.oom_control")["oom_kill"]

    def oom_kills(self) -> int:
        if self._oom_event >= 0:
            with contextlib.suppress(BlockingIOError):
                os.read(self._oom_event, 8)
                self._wait_for_the_kill()
        self._oom_seen = self._oom_count()
        return self._oom_seen

    def _wait_for_the_kill(self) -> None:
        """The kernel reports the event, then chooses whom to kill, and counts after that."""
        deadline = time.monotonic() + _UNTIL_KILLED
        while self._oom_count() == self._oom_seen and time.monotonic() < deadline:
            time.sleep(0.0005)  # the count has no event

    def oom_event_fd(self) -> int | None:
        if "memory" not in self._of:
            return None
        if self._oom_event < 0:
            path = self._of["memory"]
            event = libc.eventfd(0, os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                control = os.open(path + "/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    files.write(path + "/cgroup.event_control", f"{event} {control}")
                finally:
                    os.close(control)
            except OSError:
                os.close(event)
                raise
            self._oom_event = event
        return os.dup(self._oom_event)

    def freeze(self) -> None:
        if "freezer" not in self._driver.parents:
            raise UnsupportedError(
                "cgroup v1 has no freezer controller here, or it may not be written; "
                "mount it and run as root"
            )
        state = self.use("freezer") + "/freezer.state"
        deadline = time.monotonic() + files.PATIENCE
        # one that is forked in between may be left out for ever; who asks again, and now and then
        # from the start, gets it, too
        for attempt in itertools.count(1):
            files.write(state, "FROZEN")
            if files.read(state) == "FROZEN\n":
                return
            if time.monotonic() > deadline:
                files.write(state, "THAWED")
                raise OSError(errno.ETIMEDOUT, f"freeze {self._name}: some process does not stop")
            if attempt % 50 == 0:
                files.write(state, "THAWED")
            time.sleep(0.0005)  # this version has no event for it; reading updates the state

    def thaw(self) -> None:
        if "freezer" in self._of:
            files.write(self._of["freezer"] + "/freezer.state", "THAWED")

    def kill(self) -> None:
        for path in self._paths[:1]:  # every hierarchy has the same members
            files.kill_tree(path)
        self.thaw()  # a frozen process does not die

    def members(self) -> set[int]:
        return files.pids(self._paths[0]) if self._paths else set()

    def remove(self, *, patient: bool = True) -> None:
        if self._oom_event >= 0:
            os.close(self._oom_event)
            self._oom_event = -1
        first: OSError | None = None
        for path in reversed(self._paths):
            try:
                files.rmdir(path, files.PATIENCE if patient and first is None else 0)
                self._paths.remove(path)
            except OSError as error:
                first = first or error
        if first is not None:
            raise first
        self._of.clear()
