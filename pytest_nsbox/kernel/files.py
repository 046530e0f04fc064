"""Steps that make files and directories: as those of `mounts`, each is data, says what it will do,
and does it."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass

from pytest_nsbox.kernel import userns

UMASK = 0o022  # of who takes these steps: what it takes from a mode has to be given anew


def copy_contents(source: str, target: str) -> None:
    """Not by shutil, which has libraries for compression loaded, and so mapped in every init."""
    with open(source, "rb") as there, open(target, "wb") as here:
        while data := there.read(1 << 20):
            here.write(data)


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
            copy_contents(self.source, self.target)
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
        if self.mode & UMASK:
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
class OwnFile:
    """A file in /etc that every container has for itself, empty until its name is known.

    It is put into the writable layer before the overlay is mounted: nothing is copied up, and no
    symbolic link of the image decides where it lands.
    """

    path: str
    name: str  # its path in the container

    def describe(self) -> str:
        return f"make {self.path}"

    def do(self) -> None:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(self.path, flags, 0o644))


@dataclass(frozen=True)
class MakeSymlink:
    """symlink(2)."""

    target: str
    path: str

    def describe(self) -> str:
        return f"symlink {self.path} to {self.target}"

    def do(self) -> None:
        os.symlink(self.target, self.path)


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
