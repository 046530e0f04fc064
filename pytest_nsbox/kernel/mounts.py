"""Steps that make a file tree: each is data, says what it will do, and does it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.files import (
    UMASK,
    CopyEntry,
    LikeDir,
    MakeDir,
    MakeSymlink,
    OwnFile,
    copy_contents,
    copy_owner,
    make_mount_point,
)
from pytest_nsbox.kernel.libc import (
    MNT_DETACH,
    MS_BIND,
    MS_MOVE,
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


def begin(steps: Iterable[Step]) -> int:
    """Take the first steps to a file tree; returns a descriptor of the root that they lead to."""
    umask = os.umask(UMASK)
    try:
        run(steps)
    finally:
        os.umask(umask)
    return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def build(steps: Sequence[Step]) -> int:
    """Take the steps to a file tree, of which the last is to let go of where it was built; returns
    a descriptor of that. There is no other way to what is written there afterwards."""
    scratch = begin(steps[:-1])
    try:
        run(steps[-1:])
    except BaseException:
        os.close(scratch)
        raise
    return scratch


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
class MoveMount:
    """Have what is mounted at `source` at `target` instead."""

    source: str
    target: str

    def describe(self) -> str:
        return f"move {self.source} to {self.target}"

    def do(self) -> None:
        libc.mount(self.source, self.target, None, MS_MOVE)


@dataclass(frozen=True)
class TmpfsAt:
    """A tmpfs on a directory that is made where it does not exist."""

    target: str
    data: str

    def describe(self) -> str:
        return f"mount tmpfs on {self.target}"

    def do(self) -> None:
        os.makedirs(self.target, exist_ok=True)
        libc.mount("tmpfs", self.target, "tmpfs", MS_NOSUID | MS_NODEV, self.data)


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
            copy_contents(self.source, self.target)
            copy_owner(self.source, self.target)
        except OSError:
            BindMount(self.source, self.target, read_only=True).do()


@dataclass(frozen=True)
class ReadOnly:
    """Make a mount read-only."""

    path: str

    def describe(self) -> str:
        return f"remount {self.path} read-only"

    def do(self) -> None:
        flags = MS_BIND | MS_REMOUNT | MS_RDONLY | locked_flags(self.path)
        libc.mount("none", self.path, None, flags)


@dataclass(frozen=True)
class Device:
    """A device node like that of the host at `source`, of the container's own: so are its owner,
    mode and times. By a mount of its own it works where other devices are not to (mount(8), nodev).

    Where no node can be made, as in a user namespace, the host's own shows, and is read-only:
    reading from the device and writing to it change nothing of the node.
    """

    source: str
    target: str
    mode: int
    device: int
    uid: int
    gid: int

    def describe(self) -> str:
        return f"make {self.target} like {self.source}"

    def do(self) -> None:
        try:
            os.mknod(self.target, self.mode, self.device)
        except PermissionError:
            BindMount(self.source, self.target, read_only=True).do()
            return
        if (self.uid, self.gid) != (os.geteuid(), os.getegid()):
            os.chown(self.target, self.uid, self.gid)
        os.chmod(self.target, self.mode & 0o7777)
        libc.mount(self.target, self.target, None, MS_BIND)


@dataclass(frozen=True)
class SetSysctl:
    """A namespaced kernel parameter (proc(5), /proc/sys)."""

    name: str
    value: str
    optional: bool = False

    def describe(self) -> str:
        return f"sysctl {self.name}={self.value}"

    def do(self) -> None:
        path = f"/proc/sys/{self.name.replace('.', '/')}"
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
        new_root, put_old = self.new_root, self.put_old
        if put_old is None:
            # the old root is stacked on the new one, then detached: pivot_root(2), NOTES
            os.chdir(new_root)
            new_root = put_old = "."
        try:
            libc.pivot_root(new_root, put_old)
        except PermissionError:
            # Docker's seccomp profile refuses it even to who may mount; then the new root covers
            # the old one, out of everybody's reach: no path leads below the root of a namespace
            self._cover()
        else:
            if self.put_old is None:
                libc.umount2(".", MNT_DETACH)
        os.chdir("/")

    def _cover(self) -> None:
        if self.put_old is not None:
            libc.mount("/", self.put_old, None, MS_BIND | MS_REC)
            libc.umount2(self.put_old + self.new_root, MNT_DETACH)
        os.chdir(self.new_root)
        libc.mount(".", "/", None, libc.MS_MOVE)
        os.chroot(".")


def may_pivot() -> bool:
    """Whether pivot_root(2) gets as far as to look at its arguments."""
    try:
        libc.pivot_root("", "")
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def escape(path: str) -> str:
    """A path as overlay's options want it."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def locked_flags(path: str) -> int:
    """The flags that the mount at `path` has now."""
    found = os.statvfs(path).f_flag
    # statvfs(3) and mount(2) number these four alike
    return found & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


_STEPS: tuple[type[Any], ...] = (
    BindMount,
    CopyEntry,
    CopyFile,
    Device,
    LikeDir,
    MakeDir,
    MakeSymlink,
    Mount,
    MoveMount,
    Overlay,
    OwnFile,
    PivotRoot,
    ReadOnly,
    SetSysctl,
    SubOverlay,
    TmpfsAt,
)
_BY_NAME = {kind.__name__: kind for kind in _STEPS}


def to_wire(steps: Iterable[Step]) -> list[Any]:
    """Steps as plain data, for another process to take."""
    return [[type(step).__name__, vars(step)] for step in steps]


def from_wire(rows: Iterable[Any]) -> list[Step]:
    """The steps that `to_wire` has made data of."""
    return [_BY_NAME[name](**fields) for name, fields in rows]
