"""Unpacked layers on disk, named by what is in them, shared by every session of a user.

layers/HEX        a layer            layers/NAME.part   one being made, under locks/NAME
meta/HEX.json     whence it came; its mtime is when it was last used, to a minute
locks/HEX.use     held shared by every process that has resolved an image with this layer
index/HEX.json    an archive as stat(2) saw it, and the root filesystem that was in it
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.rootfs.source import Source

# The names of all lower directories share the one page of mount(2)'s options.
NAME = re.compile(r"[0-9a-f]{16}")
_LATELY = 60.0  # seconds, in which nobody need be told that a layer has been used again


def name_of(key: str) -> str:
    """The short name of a sha256 in hex."""
    return key[:16]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One layer in the cache."""

    name: str
    size: int  # bytes on disk
    last_used: float  # seconds since the epoch
    source: str


@dataclass(frozen=True)
class Identity:
    """An archive file and what stat(2) says to tell whether it is still the same."""

    key: str
    stat: tuple[str, str | None, int, int, int, int]


class LayerCache:
    """Layers below `root`, each for as long as any process that resolved it is alive."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        if set(":,\\") & set(str(self.root)):
            raise RootfsError(
                f"cache {str(self.root)!r}: the options of an overlay mount cannot name a path"
                " with a colon, comma or backslash: choose another directory"
            )
        self.manifests: dict[str, str] = {}  # of images in a registry: the digests
        self._held: dict[str, int] = {}
        self._lately: dict[Identity, tuple[float, Rootfs]] = {}  # when, and what was recalled

    def close(self) -> None:
        """Let go of the layers: from now on they may be removed."""
        self._lately.clear()
        while self._held:
            os.close(self._held.popitem()[1])

    # layers

    def get(self, key: str) -> str | None:
        """The directory of the layer with this sha256, now in use by this process, or None."""
        layer = self._layer(name_of(key))
        if not layer.is_dir():
            return None
        self._hold(name_of(key))
        if not layer.is_dir():  # removed while we waited
            return None
        meta = self._meta(name_of(key))
        if json.loads(meta.read_bytes())["key"] != key:
            raise RootfsError(f"cache {layer}: two layers have one name: remove it and run again")
        os.utime(meta)
        return str(layer)

    def store(self, part: Path, key: str, source: str) -> str:
        """Make a directory from `scratch` the layer with this sha256."""
        name = name_of(key)
        self._hold(name)
        _write(self._meta(name), {"key": key, "source": source})
        try:
            os.rename(part, self._layer(name))
        except OSError as error:
            # Another process had the same content from another archive, and was first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        return str(self._layer(name))

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A new directory beside the layers, under an exclusive lock; removed if still there."""
        lock = self._lock(name)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep()
            part = self.root / "layers" / f"{name}.part"
            _remove_tree(part)
            part.mkdir()
            part.chmod(0o755)  # what `/` has if the archive does not say, whatever our umask
            try:
                yield part
            finally:
                _remove_tree(part)
        finally:
            os.close(lock)

    def _sweep(self) -> None:
        """Remove what a killed process left half made: its lock is free."""
        for part in (self.root / "layers").glob("*.part"):
            with self._exclusive(part.stem) as free:
                if free:
                    _remove_tree(part)

    # archives resolved before

    def identify(self, source: Source) -> Identity:
        """The identity of an archive, or of an image layout by its index."""
        import hashlib

        index = os.path.join(source.path, "index.json")
        seen = os.stat(index if os.path.isdir(source.path) else source.path)
        key = hashlib.sha256(repr(source).encode("utf-8", "surrogateescape")).hexdigest()
        return Identity(key, (*source, seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_dev))

    def recall(self, identity: Identity, check: Callable[[Rootfs], object]) -> Rootfs | None:
        """What was resolved from this archive before, if all of it is still here; `check` has a
        look at what has not been recalled lately, and may raise."""
        when, lately = self._lately.get(identity, (0.0, None))
        # its layers are held, so only somebody who does not ask can have removed one
        if (
            lately is not None
            and time.monotonic() < when + _LATELY
            and all(map(os.path.isdir, lately.layers))
        ):
            return lately
        found = self._look_up(identity)
        if found is not None:
            check(found)
            self._lately[identity] = time.monotonic(), found
        return found

    def _look_up(self, identity: Identity) -> Rootfs | None:
        try:
            row = json.loads(self._index(identity).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if tuple(row["stat"]) != identity.stat:
            return None
        layers = []
        for key in row["keys"]:
            if (layer := self.get(key)) is None:
                return None
            layers.append(layer)
        return replace(Rootfs.from_wire(row["rootfs"]), layers=tuple(layers))

    def remember(self, identity: Identity, rootfs: Rootfs) -> None:
        keys = [self._key(Path(layer).name) for layer in rootfs.layers]
        row = {"stat": identity.stat, "keys": keys, "rootfs": rootfs.to_wire()}
        _write(self._index(identity), row)

    # keeping house

    def entries(self) -> list[Entry]:
        """The layers, the one unused for longest first."""
        found = []
        for layer in self._names():
            meta = self._meta(layer)
            with suppress(FileNotFoundError):  # another process removes it now
                found.append(
                    Entry(
                        name=layer,
                        size=_disk_usage(str(self._layer(layer)), set()),
                        last_used=meta.stat().st_mtime,
                        source=json.loads(meta.read_bytes())["source"],
                    )
                )
        return sorted(found, key=lambda entry: entry.last_used)

    def remove(self, name: str) -> bool:
        """Remove one layer; False if a living process uses it or there is none."""
        if not NAME.fullmatch(name) or not self._layer(name).is_dir():
            return False
        with self._exclusive(f"{name}.use") as free:
            if not free:
                return False
            with self.scratch(f"{name}.removed") as part:
                # Gone at once for everybody else, then at leisure.
                os.rename(self._layer(name), part / "layer")
                self._meta(name).unlink(missing_ok=True)
        return True

    def prune(self, unused_for: float = 0.0) -> list[str]:
        """Remove what nobody has used for so many seconds; returns the names."""
        before = time.time() - unused_for
        old = [name for name in self._names() if self._last_used(name) <= before]
        return [name for name in old if self.remove(name)]

    # paths and locks

    def _names(self) -> list[str]:
        try:
            return sorted(filter(NAME.fullmatch, os.listdir(self.root / "layers")))
        except FileNotFoundError:
            return []

    def _layer(self, name: str) -> Path:
        return self.root / "layers" / name

    def _meta(self, name: str) -> Path:
        return self.root / "meta" / f"{name}.json"

    def _index(self, identity: Identity) -> Path:
        return self.root / "index" / f"{name_of(identity.key)}.json"

    def _key(self, name: str) -> str:
        return str(json.loads(self._meta(name).read_bytes())["key"])

    def _last_used(self, name: str) -> float:
        try:
            return self._meta(name).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _lock(self, name: str) -> int:
        # Closed to others: an image's setuid programs must not be there for every local user.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in ("layers", "meta", "locks", "index"):
            (self.root / folder).mkdir(mode=0o700, exist_ok=True)
        path = self.root / "locks" / name
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _hold(self, name: str) -> None:
        if name not in self._held:
            lock = self._lock(f"{name}.use")
            fcntl.flock(lock, fcntl.LOCK_SH)
            self._held[name] = lock

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[bool]:
        """Whether nobody holds this lock, which is then ours."""
        lock = self._lock(name)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                free = False
            yield free
        finally:
            os.close(lock)


def _write(path: Path, value: Any) -> None:
    """Replace a small file at once, so that no reader sees half of it."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(value))
    os.replace(new, path)


def _remove_tree(path: Path) -> None:
    import shutil  # it brings the compressors with it

    shutil.rmtree(path, ignore_errors=True)


def _disk_usage(directory: str, seen: set[tuple[int, int]]) -> int:
    total = 0
    with os.scandir(directory) as found:
        for entry in found:
            status = entry.stat(follow_symlinks=False)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                total += _disk_usage(entry.path, seen)
    return total
