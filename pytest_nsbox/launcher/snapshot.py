"""Freezes what a container has written, as lower directories for the overlays of others."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pytest_nsbox import wire
from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel.overlay import OPEN_DIRECTORY, Entry, Layers, entry, same
from pytest_nsbox.launcher.changes import Own, has_text, open_layers, open_upper, was_made
from pytest_nsbox.launcher.copying import Copier
from pytest_nsbox.model.place import Place

_WHITEOUT = stat.S_IFCHR


@dataclass
class Freezer(Copier):
    """Copies what keeps a place's writings, the marks of its overlay with it."""

    own: Own = field(kw_only=True)
    place: Place = field(kw_only=True)
    root: int = field(kw_only=True)  # where it all goes
    links: dict[tuple[int, int], str] = field(default_factory=dict)

    def wanted(self, path: str, source: Entry) -> bool:
        if path in self.own.mounts:
            return False
        if path in self.own.files and has_text(source, self.own.files[path]):
            return False
        if path in self.own.directories and stat.S_ISDIR(source.status.st_mode):
            with _directory(source.directory, source.name) as fd:
                return bool(os.listdir(fd))
        return True

    def copy(self, source: Entry, directory: int, name: str, path: str) -> None:
        if source.is_whiteout(self.place.user):
            self.whiteout(directory, name, path)
            return
        status = source.status
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            inode = (status.st_dev, status.st_ino)
            if inode in self.links:
                first = self.links[inode]
                os.link(first, name, src_dir_fd=self.root, dst_dir_fd=directory)
                return
            self.links[inode] = path.removeprefix(self.place.target).lstrip("/")
        super().copy(source, directory, name, path)

    def special(self, source: Entry, directory: int, name: str, path: str) -> None:
        os.mknod(name, source.status.st_mode, source.status.st_rdev, dir_fd=directory)
        self.keep_owner(source, directory, name)

    def whiteout(self, directory: int, name: str, path: str) -> None:
        with self._a_mark(path):
            os.mknod(name, _WHITEOUT, os.makedev(0, 0), dir_fd=directory)

    def finish(self, source: Entry, fd: int) -> None:
        super().finish(source, fd)
        for name, value in source.attributes().items():
            os.setxattr(fd, name, value)
        if stat.S_ISDIR(source.status.st_mode) and source.is_opaque(self.place.user):
            # by both names, as layers of images have it; one is for overlays of the other kind
            needed, other = ("user", "trusted") if self.place.user else ("trusted", "user")
            with contextlib.suppress(OSError):
                os.setxattr(fd, f"{other}.overlay.opaque", b"y")
            with self._a_mark(source.name):
                os.setxattr(fd, f"{needed}.overlay.opaque", b"y")

    @contextlib.contextmanager
    def _a_mark(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnsupportedError(
                f"{path} was deleted, and that cannot be kept in the cache directory: "
                f"{error.strerror}; put it on a filesystem of a disk, not on an overlay "
                "(XDG_CACHE_HOME=DIRECTORY)"
            ) from None

    def made(self, upper: int, lower: Layers, here: int, path: str) -> None:
        """Copy of a directory made anew from the host's what is not the host's."""
        names = os.listdir(upper)
        for name in names:
            below = f"{path.rstrip('/')}/{name}"
            above, host = entry(upper, name), lower.find(name)
            if above is None or not self.wanted(below, above):
                continue
            if host is None:
                self.copy(above, here, name, below)
            elif stat.S_ISDIR(above.status.st_mode) and stat.S_ISDIR(host.status.st_mode):
                os.mkdir(name, 0o700, dir_fd=here)
                with _directory(upper, name) as a, _directory(here, name) as b:
                    with lower.below(name) as layers:
                        self.made(a, layers, b, below)
                    Copier.finish(self, above, b)
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(name, dir_fd=here)
            elif not same(above, host, attributes=False, times=False):
                self.copy(above, here, name, below)
        for name in lower.names().difference(names):
            if was_made(lower, name):
                self.whiteout(here, name, f"{path.rstrip('/')}/{name}")


@contextlib.contextmanager
def _directory(directory: int, name: str) -> Iterator[int]:
    fd = os.open(name, OPEN_DIRECTORY, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def take_snapshot(
    places: Sequence[Place],
    scratch: int,
    own: Own,
    into: str,
    go_on: Callable[[], None],
) -> Iterator[wire.Message]:
    """Copy every place into a directory of its own below `into`, then let the container go on;
    which directory is whose."""
    frozen = {}
    try:
        for number, place in enumerate(places):
            directory = os.path.join(into, str(number))
            os.mkdir(directory, 0o700)
            if _freeze(place, scratch, own, directory):
                frozen[place.target] = directory
            else:
                os.rmdir(directory)
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise
    finally:
        go_on()
    by_directory = any(place.kind == "made" for place in places)
    yield {"frozen": frozen, "by_directory": by_directory}


def _freeze(place: Place, scratch: int, own: Own, directory: str) -> bool:
    """Copy one place; whether there is anything in it."""
    with contextlib.ExitStack() as opened:
        upper = open_upper(place, scratch)
        if upper is None:
            return False
        opened.callback(os.close, upper)
        here = os.open(directory, OPEN_DIRECTORY)
        opened.callback(os.close, here)
        freezer = Freezer(own=own, place=place, root=here)
        layers = opened.enter_context(open_layers(place))
        top = Entry(upper, ".", os.fstat(upper))
        if place.kind == "made":
            freezer.made(upper, layers, here, place.target)
            Copier.finish(freezer, top, here)
            return bool(os.listdir(here))
        freezer.content(upper, here, place.target)
        freezer.finish(top, here)
        below = layers.find(".")
        changed = below is not None and not same(top, below, attributes=False)
        return changed or bool(os.listdir(here))
