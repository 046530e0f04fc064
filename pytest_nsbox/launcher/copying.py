"""Copies a file or a tree from one directory to another, both held by descriptors.

Either side may be a container's, where processes are at work: every name is looked up in the
directory it was found in and no symbolic link is followed, so a copy cannot be led anywhere else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from pytest_nsbox import wire
from pytest_nsbox.kernel.overlay import OPEN_DIRECTORY, Entry, entry

_CHUNK = 1 << 20
_NO_HOLES = (errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP)
_ANOTHER_FILESYSTEM = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@dataclass
class Copier:
    """How to copy. `left_out` has the paths of what was not: sockets, FIFOs and devices."""

    owner: tuple[int, int] | None = None  # of all that is made; None: as it was
    mode: int = 0o7777  # the bits of a mode that are kept
    left_out: list[str] = field(default_factory=list)
    into: tuple[int, int] = (0, 0)  # device and inode of where it all goes

    def copy(self, source: Entry, directory: int, name: str, path: str) -> None:
        """Copy an entry to `name` in `directory`; a file there is replaced, a directory is
        merged with. `path` is what it is called in messages."""
        kind = stat.S_IFMT(source.status.st_mode)
        try:
            if kind == stat.S_IFDIR:
                self._directory(source, directory, name, path)
            elif kind == stat.S_IFREG:
                _remove(directory, name)
                self._file(source, directory, name)
            elif kind == stat.S_IFLNK:
                _remove(directory, name)
                os.symlink(source.read_link(), name, dir_fd=directory)
                self.keep_owner(source, directory, name)
            else:
                self.special(source, directory, name, path)
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith("/"):
                error.filename = path
            raise

    def special(self, source: Entry, directory: int, name: str, path: str) -> None:
        self.left_out.append(path)

    def finish(self, source: Entry, fd: int) -> None:
        """Owner, mode and times of what has been made, in the order in which they last."""
        status = source.status
        if self.owner is None:
            os.fchown(fd, status.st_uid, status.st_gid)
        else:
            os.fchown(fd, *self.owner)
        os.fchmod(fd, stat.S_IMODE(status.st_mode) & self.mode)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    def wanted(self, path: str, source: Entry) -> bool:
        """Whether an entry of a directory is to be copied."""
        return True

    def keep_owner(self, source: Entry, directory: int, name: str) -> None:
        status = source.status
        owner = self.owner or (status.st_uid, status.st_gid)
        os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)

    def _directory(self, source: Entry, directory: int, name: str, path: str) -> None:
        if (source.status.st_dev, source.status.st_ino) == self.into:
            raise OSError(errno.EINVAL, "a directory cannot be copied into itself")
        made = True
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            made = False
        with contextlib.ExitStack() as opened:
            here = os.open(name, OPEN_DIRECTORY, dir_fd=directory)
            opened.callback(os.close, here)
            there = os.open(source.name, OPEN_DIRECTORY, dir_fd=source.directory)
            opened.callback(os.close, there)
            self.content(there, here, path)
            if made:
                self.finish(source, here)

    def content(self, there: int, here: int, path: str) -> None:
        """Copy all that is in the directory `there`."""
        for name in os.listdir(there):
            found = entry(there, name)
            below = f"{path.rstrip('/')}/{name}"
            if found is not None and self.wanted(below, found):  # it may just have been removed
                self.copy(found, here, name, below)

    def _file(self, source: Entry, directory: int, name: str) -> None:
        with contextlib.ExitStack() as opened:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            there = os.open(source.name, flags, dir_fd=source.directory)
            opened.callback(os.close, there)
            if not stat.S_ISREG(os.fstat(there).st_mode):
                raise OSError(errno.EBUSY, "it was replaced while it was copied")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            here = os.open(name, flags, 0o600, dir_fd=directory)
            opened.callback(os.close, here)
            copy_content(there, here)
            self.finish(source, here)


def copy_between(message: wire.Message, there: int, here: int) -> Iterator[wire.Message]:
    """What `Container.copy_in` and `copy_out` ask for."""
    name, path = str(message["name"]), str(message["path"])
    source = entry(there, name)
    if source is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    out = message["direction"] == "out"
    status = os.fstat(here)
    copier = Copier(
        owner=None if message["archive"] else (os.geteuid(), os.getegid()) if out else (0, 0),
        # what could set an identity is not to come out of a container
        mode=0o1777 if out else 0o7777,
        into=(status.st_dev, status.st_ino),
    )
    if message["new_name"] == ".":
        # the descriptors are O_PATH ones, which cannot be listed; the process is about to end
        there, here = (os.open(".", OPEN_DIRECTORY, dir_fd=fd) for fd in (there, here))
        copier.content(there, here, path.removesuffix("/."))
    else:
        kind = stat.S_IFMT(source.status.st_mode)
        if kind not in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK):
            raise OSError(errno.EINVAL, "a socket, FIFO or device cannot be copied", path)
        copier.copy(source, here, str(message["new_name"]), path)
    yield {"left_out": copier.left_out}


def _remove(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def copy_content(there: int, here: int) -> None:
    """The bytes of a file, its holes left as holes; shared on a filesystem that can."""
    size, offset = os.fstat(there).st_size, 0
    if size == 0:  # it may be one that the kernel makes up while it is read (proc(5))
        _read_to_the_end(there, here)
        return
    while offset < size:
        try:
            start = os.lseek(there, offset, os.SEEK_DATA)
            end = os.lseek(there, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                break
            if error.errno in _NO_HOLES:
                _read_to_the_end(there, here)
                return
            raise
        while start < end:
            sent = _send(there, here, start, end - start)
            if sent == 0:  # shorter than it says
                os.ftruncate(here, start)
                return
            start += sent
        offset = end
    os.ftruncate(here, size)


def _read_to_the_end(there: int, here: int) -> None:
    os.lseek(there, 0, os.SEEK_SET)
    while chunk := os.read(there, _CHUNK):
        view = memoryview(chunk)
        while view:
            view = view[os.write(here, view) :]


def _send(there: int, here: int, start: int, count: int) -> int:
    try:
        return os.copy_file_range(there, here, count, start, start)
    except OSError as error:
        if error.errno not in _ANOTHER_FILESYSTEM:
            raise
    os.lseek(here, start, os.SEEK_SET)
    return os.sendfile(here, there, start, count)
