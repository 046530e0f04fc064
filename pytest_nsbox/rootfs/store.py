"""Where the documents and layers of an image are: below a directory, or in one archive."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.rootfs.cache import LayerCache
from pytest_nsbox.rootfs.source import open_archive
from pytest_nsbox.rootfs.stream import BROKEN, CHUNK, Blob, opened


class Store(Protocol):
    """The files of an image by path."""

    @property
    def label(self) -> str: ...

    def blob(self, name: str) -> Blob | None: ...


@dataclass(frozen=True)
class _Directory:
    label: str
    stack: ExitStack

    def blob(self, name: str) -> Blob | None:
        path = os.path.join(self.label, name)
        if not os.path.exists(path):
            return None
        return self.stack.enter_context(open_archive(path))


@contextmanager
def directory_store(path: str) -> Iterator[Store]:
    with ExitStack() as stack:
        yield _Directory(path, stack)


@dataclass(frozen=True)
class _Archive:
    whole: Blob
    label: str
    members: dict[str, tuple[int, int] | str]  # offset and size, or the name linked to

    def blob(self, name: str) -> Blob | None:
        for _ in range(10):  # links to links
            found = self.members.get(posixpath.normpath(name))
            if isinstance(found, tuple):
                return Blob(self.whole.file, *found, f"{self.label}: {name}")
            if found is None:
                break
            name = found
        return None


@contextmanager
def archive_store(path: str, cache: LayerCache) -> Iterator[Store]:
    import shutil

    from pytest_nsbox.rootfs import tar

    with ExitStack() as stack:
        blob = stack.enter_context(open_archive(path))
        try:
            if blob.compression() is not None:
                # Layers are read out of order, and again by a child: a stream can be neither.
                folder = stack.enter_context(cache.scratch(f"plain-{os.getpid()}"))
                plain = stack.enter_context(open(folder / "archive.tar", "w+b"))
                with opened(blob) as streams:
                    shutil.copyfileobj(streams.plain, plain, CHUNK)
                plain.flush()
                blob = Blob.of(plain, path)
            members: dict[str, tuple[int, int] | str] = {}
            with tar.open_blob(blob) as archive:
                for member in tar.members(archive):
                    name = posixpath.normpath(member.name)
                    if member.issym():
                        members[name] = posixpath.join(posixpath.dirname(name), member.linkname)
                    elif member.islnk():
                        members[name] = member.linkname
                    elif member.isreg() and not member.issparse():
                        members[name] = (member.offset_data, member.size)
        except (tar.Damage, EOFError, OSError) as error:
            raise RootfsError(f"image {path}: {error}; {BROKEN}") from error
        yield _Archive(blob, path, members)
