"""What may outlive its owner, written down before it is made.

One file per launcher, locked (flock(2)) for as long as the launcher lives. The kernel drops the
lock with the process, so a lock that can be had is the proof that the owner is dead; its pid,
start time and boot are written down too, and must agree. Only what a dead owner's file names is
removed, never what merely looks like ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pytest_nsbox.kernel import cgroup, sysctl

CGROUP, LAYER, SYSCTL = "cgroup", "layer", "sysctl"
_SO_NETNS_COOKIE = 71


def state_directory() -> Path:
    """Where ledgers are: gone with a reboot, as most of what they name is."""
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/nsbox")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "nsbox") if runtime else cache_directory() / "ledgers"


def cache_directory() -> Path:
    """Where layers are: $XDG_CACHE_HOME/nsbox, or ~/.cache/nsbox."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache, "nsbox")


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc_pid_stat(5)).

    None when there is none, or only its exit status waits for a parent.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def layers_directory(cache: Path) -> Path:
    """Where the ledgers of layers are: a layer outlives a reboot, and so must its row."""
    return cache / "writable.ledgers"


class Ledger:
    """The rows of one owner: the calling process. Those of layers that are beside the directory
    `layers` are in a file there, made with the first one."""

    def __init__(self, directory: Path, layers: Path | None = None) -> None:
        self.directory = directory
        self._layers_directory = layers
        self._layers: Ledger | None = None
        pid = os.getpid()
        self.name = f"{boot_id()[:8]}-{pid}-{start_time(pid)}"
        while True:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._fd = os.open(
                    directory / self.name,
                    os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
                    0o600,
                )
            except FileNotFoundError:  # another owner, the last one, has just removed it
                continue
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_nlink:
                break
            os.close(
                self._fd
            )  # one who sweeps had the lock first, and has taken it for a dead one's
        self.path = directory / self.name
        owner = {"pid": pid, "start": start_time(pid), "boot": boot_id()}
        self._write({"owner": owner})

    def _write(self, row: dict[str, Any]) -> None:
        """One row, or an error and no part of it: the next one must not be written onto half."""
        line = json.dumps(row).encode() + b"\n"
        before = os.fstat(self._fd).st_size
        if os.write(self._fd, line) < len(line):
            os.ftruncate(self._fd, before)
            raise OSError(errno.ENOSPC, f"write to {self.path}: {os.strerror(errno.ENOSPC)}")

    def record(self, kind: str, value: Any) -> None:
        """Before it is made."""
        self._of(value)._write({"made": kind, "value": value})

    def strike(self, kind: str, value: Any) -> None:
        """After it is gone."""
        self._of(value)._write({"gone": kind, "value": value})

    def _of(self, value: Any) -> Ledger:
        on_disk = self._layers_directory
        if on_disk is None or not str(value).startswith(f"{on_disk.parent}/"):
            return self
        if self._layers is None:
            self._layers = Ledger(on_disk)
        return self._layers

    def file_of(self, layer: str) -> Path:
        """Where the row of a layer is written down."""
        return self._of(layer).path

    def set_sysctl(self, path: str, value: str, in_host: Callable[[], Any]) -> None:
        """Set a parameter of the host, to be put back when the last session has let go of it."""
        with _locked(self.directory), in_host():
            netns = _netns()
            was = Path(path).read_text().strip()
            for other in _others(self.directory, self.name):
                was = other.sysctls(netns).get(path, was)
            self.record(SYSCTL, [netns, path, was])
            if Path(path).read_text().strip() != value:
                sysctl.write(path, value)

    def put_back_sysctls(self, in_host: Callable[[], Any]) -> None:
        with _locked(self.directory), in_host():
            for row in _put_back(_Rows(self.directory / self.name), self.directory):
                self.strike(SYSCTL, row)

    def remove_layers(self) -> None:
        """Those that a janitor was to remove and has not."""
        if self._layers is not None:
            self._layers.remove_layers()
        for kind, value in _Rows(self.path).left:
            if kind == LAYER:
                remove_layer(value)
                self.strike(kind, value)

    def close(self) -> None:
        """Nothing to remember, unless something is there all the same: that is said, and stays
        written down for who sweeps next."""
        with contextlib.ExitStack() as stack:
            if self._layers is not None:
                stack.callback(self._layers.close)
            self._close()

    def _close(self) -> None:
        left = [
            _said(kind, value)
            for kind, value in _Rows(self.path).left
            if kind == SYSCTL or os.path.lexists(value)
        ]
        if left:
            os.close(self._fd)
            raise OSError(errno.EBUSY, f"left behind: {', '.join(left)}")
        with contextlib.suppress(OSError):
            os.unlink(self.directory / self.name)
        os.close(self._fd)
        tidy(self.directory)


def strike(path: Path, kind: str, value: Any) -> None:
    """The same in another process's ledger, for work that was handed over."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(fd, json.dumps({"gone": kind, "value": value}).encode() + b"\n")
    finally:
        os.close(fd)


def remove_layer(path: str) -> None:
    """Remove a writable layer; missing is fine. Raises OSError."""
    if not os.path.lexists(path):
        return
    try:
        _remove_tree(path)
    except (OSError, RecursionError):  # too deep for a descriptor, or a frame, for each level
        _flatten(path)


def _remove_tree(path: str) -> None:
    """As shutil.rmtree, which takes several times as long to be safe from others that write there;
    nobody does any more."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(path)


def _flatten(path: str) -> None:
    """Remove a tree of any depth: what is two levels down is moved one up, until none is."""
    number = 0
    while entries := list(os.scandir(path)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            for child in list(os.scandir(entry.path)):
                number += 1
                os.rename(child.path, f"{path}/.{number}.removed")
            os.rmdir(entry.path)
    os.rmdir(path)


class _Rows:
    """A ledger as it is read back, cut short by a crash or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner: dict[str, Any] = {}
        self.left: list[tuple[str, Any]] = []
        with contextlib.suppress(OSError):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    self._read(json.loads(line))

    def _read(self, row: dict[str, Any]) -> None:
        if "owner" in row:
            self.owner = row["owner"]
        elif "made" in row:
            self.left.append((row["made"], row["value"]))
        elif "gone" in row and (row["gone"], row["value"]) in self.left:
            self.left.remove((row["gone"], row["value"]))

    def sysctls(self, netns: int) -> dict[str, str]:
        """What was found in the parameters that the owner has set in a network namespace."""
        rows = [value for kind, value in self.left if kind == SYSCTL and len(value) == 3]
        return {path: was for where, path, was in rows if where == netns}

    def owner_is_dead(self) -> bool:
        """By pid, start time and boot; the lock has been had already."""
        if not self.owner or self.owner.get("boot") != boot_id():
            return True
        return start_time(int(self.owner["pid"])) != self.owner.get("start")


def sysctls_in(path: Path) -> list[str]:
    """The parameters that a ledger's owner has set, and what was found in them."""
    rows = [value for kind, value in _Rows(path).left if kind == SYSCTL and _is_sysctl(value)]
    return [f"{path} (was {was})" for _, path, was in rows]


def _others(directory: Path, but: str) -> Iterator[_Rows]:
    for path in sorted(directory.glob("*-*-*")):
        if path.name != but:
            yield _Rows(path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One at a time among all who touch the host's parameters."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _netns() -> int:
    """Which network namespace this is: the same path is another parameter in each.

    A cookie is never given out again (since Linux 5.14), as an inode number is.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            cookie = sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError:
            return os.stat("/proc/self/ns/net").st_ino
    return int.from_bytes(cookie, sys.byteorder)


def _put_back(rows: _Rows, directory: Path) -> list[Any]:
    """Put back what nobody else holds; returns the rows that are done with."""
    netns = _netns()
    others = list(_others(directory, rows.path.name))
    held = {path for other in others for path in other.sysctls(netns)}
    for path, was in rows.sysctls(netns).items():
        if path not in held:
            with contextlib.suppress(FileNotFoundError):  # the device has gone
                sysctl.write(path, was)
    return [[netns, path, was] for path, was in rows.sysctls(netns).items()]


def sweep_all(state: Path, cache: Path) -> list[str]:
    """Remove what dead owners have left, by the ledgers of both places; returns what that was."""
    return sweep(state) + sweep(layers_directory(cache))


def sweep(directory: Path) -> list[str]:
    """Remove what dead owners have left; returns what that was."""
    removed: list[str] = []
    for path in sorted(directory.glob("*-*-*")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rows = _Rows(path)
            if os.fstat(fd).st_nlink and rows.owner_is_dead():
                removed += _undo(rows, directory)
                # what cannot be removed now waits for the next one to try, and a parameter of
                # another network namespace for a session there
                if not rows.left:
                    path.unlink(missing_ok=True)
        except BlockingIOError:
            continue  # its owner lives
        finally:
            os.close(fd)
    tidy(directory)
    return removed


def _undo(rows: _Rows, directory: Path) -> list[str]:
    undone: list[tuple[str, Any]] = []
    with _locked(directory):
        undone += [(SYSCTL, row) for row in _put_back(rows, directory)]
    gone: list[tuple[str, Any]] = []
    for kind, value in reversed(rows.left):
        if kind not in (CGROUP, LAYER):
            if kind != SYSCTL or not _is_sysctl(value):
                gone.append((kind, value))  # a row that means nothing
            continue
        there = os.path.lexists(value)
        try:
            cgroup.remove_tree(value) if kind == CGROUP else remove_layer(value)
        except OSError:
            continue
        (undone if there else gone).append((kind, value))
    rows.left = [row for row in rows.left if row not in undone and row not in gone]
    return [_said(kind, value) for kind, value in undone]


def _said(kind: str, value: Any) -> str:
    return f"{kind} {value[1] if kind == SYSCTL and _is_sysctl(value) else value}"


def _is_sysctl(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3


def tidy(directory: Path) -> None:
    """An empty directory is nothing to leave behind."""
    with contextlib.suppress(OSError):
        directory.rmdir()
