"""What the layers of an overlay say, read without mounting it.

As of the kernel's Documentation/filesystems/overlayfs.rst: whiteouts and opaque directories.
All is reached by directory descriptors, one name at a time: no symbolic link is ever followed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pytest_nsbox.kernel import userns

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# what an overlay or a security module of the host writes there itself
_NOT_CONTENT = ("trusted.overlay.", "user.overlay.", "security.selinux", "security.evm")


class Entry(NamedTuple):
    """A name in an open directory."""

    directory: int
    name: str
    status: os.stat_result

    def read_link(self) -> str:
        return os.readlink(self.name, dir_fd=self.directory)

    def attributes(self) -> dict[str, bytes]:
        """Its extended attributes (xattr(7)) but for the overlay's marks."""
        path = self._path()
        with contextlib.suppress(OSError):  # a filesystem without them
            return {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
                if not name.startswith(_NOT_CONTENT)
            }
        return {}

    def mark(self, name: str, user: bool) -> bytes | None:
        """One of the overlay's marks."""
        attribute = f"{'user' if user else 'trusted'}.overlay.{name}"
        with contextlib.suppress(OSError):
            return os.getxattr(self._path(), attribute, follow_symlinks=False)
        return None

    def is_whiteout(self, user: bool) -> bool:
        mode = self.status.st_mode
        if stat.S_ISCHR(mode):
            return self.status.st_rdev == 0
        # the form for overlays on overlays, which cannot have the device (since Linux 6.7)
        empty = stat.S_ISREG(mode) and self.status.st_size == 0
        return empty and self.mark("whiteout", user) is not None

    def is_opaque(self, user: bool) -> bool:
        """Whether a directory hides what is below it; "x" says only that it has whiteouts."""
        return self.mark("opaque", user) == b"y"

    def _path(self) -> str:
        # there is no lgetxattr(2) with a directory
        return f"/proc/self/fd/{self.directory}/{self.name}"


def entry(directory: int, name: str) -> Entry | None:
    """What has this name, None where nothing has."""
    try:
        return Entry(directory, name, os.stat(name, dir_fd=directory, follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return None


class Layers:
    """One directory of an overlay's lower layers, topmost first."""

    def __init__(self, directories: Sequence[int], user: bool) -> None:
        self._directories = directories
        self._user = user

    def find(self, name: str) -> Entry | None:
        """What the layers together show under a name."""
        for directory in self._directories:
            found = entry(directory, name)
            if found is not None:
                return None if found.is_whiteout(self._user) else found
        return None

    def names(self) -> set[str]:
        """All that the layers together show here."""
        names = {name for directory in self._directories for name in os.listdir(directory)}
        return {name for name in names if self.find(name) is not None}

    @contextlib.contextmanager
    def below(self, name: str) -> Iterator[Layers]:
        """The same for a directory in this one."""
        with contextlib.ExitStack() as opened:
            directories = []
            for directory in self._directories:
                found = entry(directory, name)
                if found is None:
                    continue
                if not stat.S_ISDIR(found.status.st_mode):
                    break
                try:
                    fd = os.open(name, OPEN_DIRECTORY, dir_fd=directory)
                except PermissionError:  # of another user's: it cannot be seen inside either
                    break
                opened.callback(os.close, fd)
                directories.append(fd)
                if found.is_opaque(self._user):
                    break
            yield Layers(directories, self._user)


def same(one: Entry, other: Entry, *, attributes: bool = True, times: bool = True) -> bool:
    """Whether two entries cannot be told apart, but for the time of a directory or a link."""
    a, b = one.status, other.status
    if a.st_mode != b.st_mode or _owner(a) != _owner(b):
        return False
    if attributes and one.attributes() != other.attributes():
        return False
    if stat.S_ISLNK(a.st_mode):
        return one.read_link() == other.read_link()
    if stat.S_ISREG(a.st_mode):
        if times and a.st_mtime_ns != b.st_mtime_ns:
            return False
        return a.st_size == b.st_size and (
            # an overlay's file that has attributes only has the content of the one below
            one.mark("metacopy", False) is not None or same_content(one, other)
        )
    return a.st_rdev == b.st_rdev


def _owner(status: os.stat_result) -> tuple[int, int]:
    """Who owns a file; one whose owner is nobody in this user namespace is copied as root's."""
    ids = (status.st_uid, status.st_gid)
    if userns.is_complete():
        return ids
    nobody = userns.overflow_ids()
    return (0 if ids[0] == nobody[0] else ids[0], 0 if ids[1] == nobody[1] else ids[1])


def same_content(one: Entry, other: Entry) -> bool:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with (
        open(os.open(one.name, flags, dir_fd=one.directory), "rb") as a,
        open(os.open(other.name, flags, dir_fd=other.directory), "rb") as b,
    ):
        while True:
            chunk = a.read(1 << 20)
            if chunk != b.read(1 << 20):
                return False
            if not chunk:
                return True
