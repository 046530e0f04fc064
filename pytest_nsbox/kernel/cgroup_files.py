"""What both versions of cgroups share: their files, their directories, who is in them."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Iterator

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.model.limits import Limits

FEATURES = ("cpu", "cpuset", "memory", "swap", "pids", "io", "freezer")
PATIENCE = 5.0  # seconds to wait for the kernel to finish with a process

_FEATURE_OF = {
    "cpus": "cpu",
    "cpuset": "cpuset",
    "memory": "memory",
    "swap": "swap",
    "pids": "pids",
    "io": "io",
}
PERIOD, _LONGEST_PERIOD, _LEAST_QUOTA = 100_000, 1_000_000, 1_000  # microseconds


def _named(error: OSError, what: str) -> OSError:
    return OSError(error.errno, f"{what}: {os.strerror(error.errno or 0)}")


def read(path: str) -> str:
    """The text of a cgroup file. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(fd, 65536):
                parts.append(part)
        finally:
            os.close(fd)
    except OSError as error:
        raise _named(error, f"read {path}") from error
    return b"".join(parts).decode()


def read_int(path: str) -> int:
    return int(read(path))


def read_table(path: str) -> dict[str, int]:
    """A file of lines `name value`, such as cpu.stat."""
    return parse_table(read(path))


def parse_table(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def write(path: str, value: str) -> None:
    """Write to a cgroup file. Raises OSError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise _named(error, f"write {value!r} to {path}") from error


def mkdir(path: str, *, exist_ok: bool = False) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError as error:
        if not exist_ok:
            raise _named(error, f"mkdir {path}") from error
    except OSError as error:
        raise _named(error, f"mkdir {path}") from error


def pids(path: str) -> set[int]:
    """Who is in a cgroup; empty when there is no such cgroup. 0 is one that we cannot see."""
    try:
        return {int(line) for line in read(path + "/cgroup.procs").split()}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return set()
        raise


def children(path: str) -> list[str]:
    """The cgroups directly below; empty when there is no such cgroup."""
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def move_all(source: str, target: str, *, leave: bool = False) -> None:
    """Move every process that is in `source` to `target`, until none is missing there.

    A process that has not been moved yet forks into the old cgroup, hence the repetition.
    `leave` says that both are of one hierarchy, so that who has moved is in `source` no more.
    """
    while missing := pids(source) - ({0} if leave else pids(target) | {0}):
        for pid in missing:
            with contextlib.suppress(ProcessLookupError):
                write(target + "/cgroup.procs", str(pid))


def kill_tree(path: str) -> None:
    """SIGKILL to every process in a cgroup and below it. Does not wait for their end."""
    try:
        write(path + "/cgroup.kill", "1")
    except FileNotFoundError:  # v1, Linux before 5.14, or no such cgroup
        _kill_one_by_one(path)


def _kill_one_by_one(path: str) -> None:
    """A process with a SIGKILL pending cannot fork, so it ends when nobody new is found."""
    killed: set[int] = set()
    while new := pids(path) - killed - {0}:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= new
    for child in children(path):
        _kill_one_by_one(child)


def rmdir(path: str, patience: float = PATIENCE) -> None:
    """Remove a cgroup and what is below it; missing is fine.

    Members that are about to end are waited for, so many seconds in all. Raises OSError (EBUSY)
    if some do not.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                members = ", ".join(map(str, sorted(pids(path))))
                raise _named(error, f"rmdir {path} (members: {members or 'none'})") from error
        for child in children(path):
            rmdir(child, max(deadline - time.monotonic(), 0))
        _wait_empty(path, deadline)


def _wait_empty(path: str, deadline: float) -> None:
    if os.path.exists(path + "/cgroup.events"):
        wait_event(path, "populated", 0, deadline)
        return
    # v1 reports no event, but its members do, each by its end.
    with _pidfds(pids(path)) as pidfds:
        for fd in pidfds:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0, deadline - time.monotonic()) * 1000)
    if not pidfds:
        time.sleep(0.0005)  # its last member has ended and is being taken off the list


@contextlib.contextmanager
def _pidfds(members: set[int]) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        fds = []
        for pid in members - {0}:
            with contextlib.suppress(ProcessLookupError):
                fds.append(os.pidfd_open(pid))
                stack.callback(os.close, fds[-1])
        yield fds


def wait_event(path: str, key: str, value: int, deadline: float) -> bool:
    """Wait until cgroup.events says so (v2); False at the deadline. A cgroup gone is fine."""
    try:
        fd = os.open(path + "/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        # Reading is what arms the next POLLPRI, so read first.
        while parse_table(os.pread(fd, 4096, 0).decode()).get(key) != value:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        os.close(fd)
    return True


def bandwidth(cpus: float) -> tuple[int, int]:
    """Quota and period in microseconds for a number of cores.

    The kernel takes no quota below 1 ms, so for little bandwidth the period is made longer.
    """
    period = min(_LONGEST_PERIOD, max(PERIOD, round(_LEAST_QUOTA / cpus)))
    return max(_LEAST_QUOTA, round(cpus * period)), period


def check_cores(asked: str, there: str) -> None:
    """Raises UnsupportedError for a list of cores of which some are not in the list `there`.

    The kernel would refuse it with EACCES (v1), or take it and run on other cores (v2).
    """
    if missing := _cores(asked) - _cores(there):
        names = ",".join(map(str, sorted(missing)))
        raise UnsupportedError(
            f"cpuset={asked!r}: core {names} may not be used here; the cores here are {there}"
        )


def _cores(text: str) -> set[int]:
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def check_features(limits: Limits, available: frozenset[str], reason: str, cure: str) -> None:
    """Raises UnsupportedError for a limit that the cgroups here cannot keep."""
    for keyword, feature in _FEATURE_OF.items():
        value = getattr(limits, keyword)
        if value is not None and feature not in available:
            raise UnsupportedError(f"{keyword}={value!r}: {reason.format(feature)}; {cure}")


def whole_disk(io: object, device: str | None) -> str:
    """The disk that a "major:minor" is on; the kernel refuses limits on a partition (ENODEV)."""
    if device is None or device.startswith("0:"):
        raise UnsupportedError(
            f"io={io!r}: the writable layer is on no block device; "
            "set XDG_CACHE_HOME to a directory on a disk, in a container to one in a volume"
        )
    entry = f"/sys/dev/block/{device}"
    if os.path.exists(f"{entry}/partition"):
        return read(os.path.realpath(entry) + "/../dev").strip()
    return device


def resident(members: set[int]) -> int:
    """Bytes of memory that processes have, for where no memory controller counts."""
    pages = 0
    for pid in members:
        with contextlib.suppress(OSError):
            pages += int(read(f"/proc/{pid}/statm").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
