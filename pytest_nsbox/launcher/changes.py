"""What a container has changed, read from the directories that keep what it writes."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pytest_nsbox import wire
from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.overlay import OPEN_DIRECTORY, Entry, Layers, entry, same
from pytest_nsbox.model.order import Order
from pytest_nsbox.model.place import Place

_ROWS = 500  # in one message: with the longest paths they are still under its limit


@dataclass(frozen=True)
class Own:
    """What is nsbox's doing and not the test's."""

    files: Mapping[str, str]  # path: the text it was given
    mounts: frozenset[str]  # what is below is not the image's, or another place's
    directories: frozenset[str]  # on the way to those

    @classmethod
    def of(cls, order: Order, places: Iterable[Place], files: Mapping[str, str]) -> Own:
        mounts = {place.target for place in places if place.target != "/"}
        mounts |= {"/proc", "/sys", "/dev", *order.passthrough}
        mounts |= {os.path.normpath(mount.dst) for mount in (*order.mounts, *order.brought)}
        directories = {"/etc", "/run/lock"}
        for path in mounts:
            while path != "/":
                path = os.path.dirname(path)
                directories.add(path)
        return cls(files, frozenset(mounts), frozenset(directories))


@dataclass
class Reading:
    """Reads one place after the other."""

    own: Own
    found: list[tuple[str, str]] = field(default_factory=list)

    def place(self, place: Place, scratch: int) -> None:
        """Read one of a container's places."""
        with contextlib.ExitStack() as opened:
            upper = open_upper(place, scratch)
            if upper is None:
                return
            opened.callback(os.close, upper)
            self._user, self._made = place.user, place.kind == "made"
            layers = opened.enter_context(open_layers(place))
            if place.kind == "overlay":
                top, below = Entry(upper, ".", os.fstat(upper)), layers.find(".")
                if below is not None and not same(top, below, attributes=False):
                    self._add(place.target, "changed")
            prefix = "" if place.target == "/" else place.target
            self._directory(prefix, upper, layers, whole=self._made)

    def _add(self, path: str, kind: str) -> None:
        self.found.append((path, kind))

    def _directory(self, prefix: str, upper: int, lower: Layers, *, whole: bool) -> None:
        """Everything in one directory. `whole` says that nothing of `lower` shows through."""
        names = os.listdir(upper)
        for name in names:
            path = f"{prefix}/{name}"
            if path not in self.own.mounts:
                with contextlib.suppress(FileNotFoundError):  # it has just been removed
                    self._entry(path, upper, name, lower, whole)
        if whole:
            for name in lower.names().difference(names):
                if not self._made or was_made(lower, name):
                    self._add(f"{prefix}/{name}", "deleted")

    def _entry(self, path: str, upper: int, name: str, lower: Layers, whole: bool) -> None:
        above = entry(upper, name)
        if above is None:
            return
        below = lower.find(name)
        if above.is_whiteout(self._user):
            if below is not None:
                self._add(path, "deleted")
            return
        if path in self.own.files and has_text(above, self.own.files[path]):
            return
        own_directory = path in self.own.directories
        is_directory = stat.S_ISDIR(above.status.st_mode)
        if below is None:
            if not (own_directory and is_directory):
                self._add(path, "added")
        elif not same(
            above, below, attributes=not (own_directory or self._made), times=not self._made
        ):
            self._add(path, "changed")
        if is_directory:
            whole = whole or above.is_opaque(self._user)
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=upper)
            try:
                with lower.below(name) as layers:
                    self._directory(path, fd, layers, whole=whole)
            finally:
                os.close(fd)


def open_upper(place: Place, scratch: int) -> int | None:
    """The directory that keeps what is written; None where there is none: a filesystem that is
    shown read-only."""
    try:
        if place.on_disk:
            return os.open(place.upper, OPEN_DIRECTORY)
        return os.open(place.upper.lstrip("/"), OPEN_DIRECTORY, dir_fd=scratch)
    except FileNotFoundError:
        return None


def write_upper(places: Iterable[Place], scratch: int, path: str, text: str) -> None:
    """Write a file of nsbox's own below a root that is read-only, where nothing can have put a
    link in the way."""
    place = max(
        (place for place in places if path.startswith(place.target.rstrip("/") + "/")),
        key=lambda place: len(place.target),
    )
    upper = open_upper(place, scratch)
    if upper is None:
        return
    try:
        flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        name = path.removeprefix(place.target).lstrip("/")
        with open(os.open(name, flags, dir_fd=upper), "w", encoding="utf-8") as file:
            file.write(text)
    finally:
        os.close(upper)


def was_made(lower: Layers, name: str) -> bool:
    """Of the host's own entries links and small files are made anew; others are mounted on,
    or not shown at all."""
    below = lower.find(name)
    if below is None or not stat.S_ISREG(below.status.st_mode):
        return below is not None and stat.S_ISLNK(below.status.st_mode)
    return os.access(name, os.R_OK, dir_fd=below.directory)


@contextlib.contextmanager
def open_layers(place: Place) -> Iterator[Layers]:
    """What a place's overlay has below what is written."""
    with contextlib.ExitStack() as opened:
        lower = []
        for path in place.lower:
            lower.append(_open_lower(path))
            opened.callback(os.close, lower[-1])
        yield Layers(lower, place.user)


def _open_lower(path: str) -> int:
    """A lower directory as the overlay sees it: without what else is mounted below."""
    try:
        tree = libc.open_tree(path, libc.OPEN_TREE_CLONE | libc.OPEN_TREE_CLOEXEC)
    except OSError:  # not for ordinary users; they have none with mounts below
        return os.open(path, OPEN_DIRECTORY)
    try:  # that one is O_PATH, and cannot be listed
        return os.open(".", OPEN_DIRECTORY, dir_fd=tree)
    finally:
        os.close(tree)


def has_text(found: Entry, text: str) -> bool:
    status, data = found.status, text.encode()
    if not stat.S_ISREG(status.st_mode) or status.st_size != len(data):
        return False
    if status.st_mode & 0o7777 != 0o644 or (status.st_uid, status.st_gid) != (0, 0):
        return False
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(found.name, flags, dir_fd=found.directory), "rb") as file:
        return file.read() == data


def read_changes(
    places: Iterable[Place], scratch: int, order: Order, files: Mapping[str, str]
) -> Iterator[wire.Message]:
    """All changes, in messages of some of them; the last one is without `more`."""
    places = list(places)
    reading = Reading(Own.of(order, places, files))
    for place in places:
        reading.place(place, scratch)
    rows = reading.found
    for start in range(0, max(len(rows), 1), _ROWS):
        chunk = rows[start : start + _ROWS]
        yield {"rows": chunk, "more": True} if start + _ROWS < len(rows) else {"rows": chunk}
