"""Steps that make a file tree: each is data, says what it will do, and does it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pytest_nsbox.kernel import libc, userns
from pytest_nsbox.kernel.libc import (
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
)

EMPTY = "/empty"  # a directory with nothing in it, while a container is built


class Step(Protocol):
    """One thing to do while a container is built. `do` raises OSError."""

    def describe(self) -> str: ...
    def do(self) -> None: ...


def run(steps: Iterable[Step]) -> None:
    """Do every step in order. Raises OSError whose text names the step that failed."""
    for step in steps:
        try:
            step.do()
        except OSError as error:
            text = error.strerror or str(error)
            what = step.describe()
            if not text.startswith(what):
                text = f"{what}: {text}"
            raise OSError(error.errno, text) from error


@dataclass(frozen=True)
class Mount:
    """mount(2)."""

    source: str
    target: str
    fstype: str | None = None
    flags: int = 0
    data: str = ""

    def describe(self) -> str:
        return f"mount {self.fstype or libc.flag_names(self.flags)} {self.source} on {self.target}"

    def do(self) -> None:
        libc.mount(self.source, self.target, self.fstype, self.flags, self.data)


@dataclass(frozen=True)
class BindMount:
    """Show `source` at `target`. A missing target is made, of the kind that the source is."""

    source: str
    target: str
    read_only: bool = False
    flags: int = 0
    recursive: bool = False

    def describe(self) -> str:
        return f"bind {self.source} on {self.target}" + (" read-only" if self.read_only else "")

    def do(self) -> None:
        make_mount_point(self.target, os.path.isdir(self.source))
        recursive = MS_REC if self.recursive else 0
        libc.mount(self.source, self.target, None, MS_BIND | recursive)
        if self.read_only and self.recursive:
            libc.make_read_only(self.target)
        flags = self.flags | (MS_RDONLY if self.read_only else 0)
        if flags:  # a bind mount takes its flags in a second call (mount(2))
            # flags that the source's mount is locked to must be repeated, or it is EPERM
            flags |= locked_flags(self.target)
            libc.mount("none", self.target, None, MS_BIND | MS_REMOUNT | flags)


@dataclass(frozen=True)
class Overlay:
    """An overlay filesystem (the kernel's Documentation/filesystems/overlayfs.rst).

    It is volatile: what is written is never waited for on its way to a disk.

    `lower` has the topmost layer first. `user` keeps its marks in user.* attributes, as an
    overlay in a user namespace must.
    """

    lower: tuple[str, ...]
    upper: str
    work: str
    target: str
    user: bool = False

    def describe(self) -> str:
        return f"mount overlay of {':'.join(self.lower)} on {self.target}"

    def do(self) -> None:
        try:
            self._mount(self.lower, self.work)
        except OSError as error:
            if error.errno != errno.ELOOP or len(self.lower) < 2:
                raise
            # the bottom is a directory that another layer lies below, which is refused; shown by
            # an overlay of its own it is not the same any more
            base, work = self.work + "-base", self.work + "-again"  # the first is marked volatile
            os.mkdir(base)
            os.mkdir(work)
            options = f"lowerdir={escape(self.lower[-1])}:{EMPTY}" + ",userxattr" * self.user
            libc.mount("overlay", base, "overlay", MS_NODEV | MS_RDONLY, options)
            self._mount((*self.lower[:-1], base), work)

    def _mount(self, layers: Sequence[str], work: str) -> None:
        lower = ":".join(map(escape, layers))
        # what is written has to be whole and in its place, as it is read without the overlay, too
        data = f"lowerdir={lower},upperdir={escape(self.upper)},workdir={escape(work)}"
        data += (
            ",userxattr,volatile"
            if self.user
            else ",xino=off,redirect_dir=off,metacopy=off,volatile"
        )
        if len(data) >= os.sysconf("SC_PAGESIZE"):
            raise OSError(7, f"{len(layers)} layers do not fit into the mount's one page")
        libc.mount("overlay", self.target, "overlay", MS_NODEV, data)


@dataclass(frozen=True)
class SubOverlay:
    """The same for a filesystem mounted below the root; one that cannot be a lower layer shows
    read-only instead (file systems without case, such as vfat, cannot be)."""

    lower: str
    scratch: str
    target: str
    user: bool = False
    cover: str | None = None  # a layer over it
    frozen: tuple[str, ...] = ()  # and a snapshot's over that, topmost first

    def layers(self) -> tuple[str, ...]:
        cover = () if self.cover is None else (self.cover,)
        return (*self.frozen, *cover, self.lower)

    def describe(self) -> str:
        return f"show {self.lower} copy-on-write on {self.target}"

    def do(self) -> None:
        if not os.path.isdir(self.lower):
            BindMount(self.lower, self.target, read_only=True).do()
            return
        upper, work = self.scratch + "/upper", self.scratch + "/work"
        os.makedirs(upper, exist_ok=True)
        os.makedirs(work)
        copy_owner(self.frozen[0] if self.frozen else self.lower, upper)
        make_mount_point(self.target, True)
        try:
            Overlay(self.layers(), upper, work, self.target, self.user).do()
        except OSError:
            if self.frozen:
                raise
            # with what is mounted below, which is locked to it in a user namespace
            BindMount(self.lower, self.target, read_only=True, recursive=True).do()


@dataclass(frozen=True)
class CopyFile:
    """A copy of a small regular file; anything else, or one that cannot be read, shows
    read-only."""

    source: str
    target: str
    largest: int = 1 << 20

    def describe(self) -> str:
        return f"copy {self.source} to {self.target}"

    def do(self) -> None:
        try:
            found = os.lstat(self.source)
            if not stat.S_ISREG(found.st_mode) or found.st_size > self.largest:
                raise OSError(errno.EFBIG, self.describe())
            shutil.copyfile(self.source, self.target, follow_symlinks=False)
            copy_owner(self.source, self.target)
        except OSError:
            BindMount(self.source, self.target, read_only=True).do()


@dataclass(frozen=True)
class CopyEntry:
    """A copy of a file, link or the like of a snapshot, which is not to be written to itself."""

    source: str
    target: str

    def describe(self) -> str:
        return f"copy {self.source} to {self.target}"

    def do(self) -> None:
        found = os.lstat(self.source)
        if stat.S_ISREG(found.st_mode):
            shutil.copyfile(self.source, self.target)
            copy_owner(self.source, self.target)
            os.utime(self.target, ns=(found.st_atime_ns, found.st_mtime_ns))
            return
        if stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(self.source), self.target)
        else:
            os.mknod(self.target, found.st_mode, found.st_rdev)
        os.chown(self.target, found.st_uid, found.st_gid, follow_symlinks=False)


@dataclass(frozen=True)
class MakeDir:
    """mkdir(2), with its parents, and exactly this mode. One that exists is left as it is."""

    path: str
    mode: int = 0o755

    def describe(self) -> str:
        return f"mkdir {self.path}"

    def do(self) -> None:
        try:
            os.mkdir(self.path, self.mode)
        except FileExistsError:
            return
        except FileNotFoundError:
            os.makedirs(self.path, exist_ok=True)
        os.chmod(self.path, self.mode)


@dataclass(frozen=True)
class LikeDir:
    """A directory with the owner and mode of another, where there is that other."""

    path: str
    like: str

    def describe(self) -> str:
        return f"mkdir {self.path} like {self.like}"

    def do(self) -> None:
        os.makedirs(self.path, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            copy_owner(self.like, self.path)


@dataclass(frozen=True)
class WriteFile:
    """A file with this text; None of it reaches what was there before."""

    path: str
    text: str = ""
    mode: int = 0o644

    def describe(self) -> str:
        return f"write {self.path}"

    def do(self) -> None:
        fd = self.open(os.O_CREAT | os.O_TRUNC)
        try:
            os.write(fd, self.text.encode())
        finally:
            os.close(fd)

    def open(self, flags: int = 0) -> int:
        """A descriptor to write to it."""
        return os.open(self.path, flags | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, self.mode)


@dataclass(frozen=True)
class MakeSymlink:
    """symlink(2)."""

    target: str
    path: str

    def describe(self) -> str:
        return f"symlink {self.path} to {self.target}"

    def do(self) -> None:
        os.symlink(self.target, self.path)


@dataclass(frozen=True)
class ReadOnly:
    """Make a mount read-only, or with `bind` a part of one, by a mount of its own on itself; a
    missing path needs nothing."""

    path: str
    bind: bool = True

    def describe(self) -> str:
        return f"remount {self.path} read-only"

    def do(self) -> None:
        if self.bind:
            try:
                libc.mount(self.path, self.path, None, MS_BIND)
            except FileNotFoundError:
                return
        flags = MS_BIND | MS_REMOUNT | MS_RDONLY | locked_flags(self.path)
        libc.mount("none", self.path, None, flags)


@dataclass(frozen=True)
class SetSysctl:
    """A namespaced kernel parameter (proc(5), /proc/sys)."""

    name: str
    value: str
    root: str = ""
    optional: bool = False

    def describe(self) -> str:
        return f"sysctl {self.name}={self.value}"

    def do(self) -> None:
        path = f"{self.root}/proc/sys/{self.name.replace('.', '/')}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if self.optional:
                return
            raise
        try:
            os.write(fd, self.value.encode())
        finally:
            os.close(fd)


@dataclass(frozen=True)
class PivotRoot:
    """Make `new_root` the root; the old one is found at `put_old`, or is let go of if None."""

    new_root: str
    put_old: str | None = None

    def describe(self) -> str:
        return f"pivot_root {self.new_root}"

    def do(self) -> None:
        if self.put_old is not None:
            libc.pivot_root(self.new_root, self.put_old)
            os.chdir("/")
            return
        # the old root is stacked on the new one, then detached: pivot_root(2), NOTES
        os.chdir(self.new_root)
        libc.pivot_root(".", ".")
        libc.umount2(".", MNT_DETACH)
        os.chdir("/")


def escape(path: str) -> str:
    """A path as overlay's options want it."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def copy_owner(source: str, target: str) -> None:
    """Give `target` the owner and the mode of `source`."""
    found = os.stat(source)
    owner = (found.st_uid, found.st_gid)
    if owner != (os.geteuid(), os.getegid()) and not _is_nobodys(*owner):
        with contextlib.suppress(PermissionError):
            os.chown(target, *owner)
    os.chmod(target, found.st_mode & 0o7777)


def _is_nobodys(uid: int, gid: int) -> bool:
    """Whether an owner is one that the user namespace does not map: root's copy is root's."""
    return not userns.is_complete() and (
        uid == userns.overflow_ids()[0] or gid == userns.overflow_ids()[1]
    )


def make_mount_point(path: str, directory: bool) -> None:
    """Make sure that there is something at `path` to mount on."""
    if directory:
        os.makedirs(path, exist_ok=True)
        return
    flags = os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        os.close(os.open(path, flags, 0o644))
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, flags, 0o644))


def locked_flags(path: str) -> int:
    """The flags that the mount at `path` has now."""
    found = os.statvfs(path).f_flag
    # statvfs(3) and mount(2) number these four alike
    return found & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


@dataclass(frozen=True)
class MountPoint:
    """One line of /proc/PID/mountinfo (proc(5))."""

    path: str
    fstype: str
    read_only: bool


def mount_points() -> list[MountPoint]:
    """What is mounted in this mount namespace, outermost first, each path once."""
    found: dict[str, MountPoint] = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, after = line.split(" - ", 1)
            path, options = before.split(" ")[4:6]
            if "\\" in path:
                path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
            found[path] = MountPoint(path, after.split(" ", 1)[0], options.split(",")[0] == "ro")
    return sorted(found.values(), key=lambda mount: mount.path)


class MountWatch:
    """The mount points, read again only when the kernel says that they have changed.

    A mountinfo that is held open polls as an exception after a change (proc_pid_mountinfo(5)).
    """

    def __init__(self) -> None:
        self._fd = -1
        self._pid = 0
        self._found: list[MountPoint] = []

    def now(self) -> list[MountPoint]:
        """What is mounted, the same object until that changes. A forked child is given what its
        parent knew."""
        if self._pid and self._pid != os.getpid():
            return self._found
        if self._fd < 0:
            self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            self._pid = os.getpid()
        elif self._found and not self._changed():
            return self._found
        self._found = []  # a change is told once, and reading may fail
        self._found = mount_points()
        return self._found

    def _changed(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLPRI)
        return bool(poll.poll(0))
