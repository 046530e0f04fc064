"""The bytes of an archive: ranges of a file, hashed on the way, decompressed by their magic."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from pytest_nsbox.errors import RootfsError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 1 << 20
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
BROKEN = "the archive is truncated or corrupt: make or download it again"


@dataclass(frozen=True)
class Blob:
    """A range of an open file, and what to call it in an error."""

    file: IO[bytes]
    offset: int
    size: int
    label: str

    @classmethod
    def of(cls, file: IO[bytes], label: str) -> Blob:
        return cls(file, 0, os.fstat(file.fileno()).st_size, label)

    def open(self) -> io.BufferedReader:
        """A reader with a position of its own, so that a forked child can share the file."""
        return io.BufferedReader(_Range(self), CHUNK)

    def compression(self) -> str | None:
        # The media type may lie, and a docker archive has none: the bytes decide.
        head = os.pread(self.file.fileno(), min(self.size, 8), self.offset)
        return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)

    def read(self, limit: int) -> bytes:
        """All of it, where it is a document and not a layer."""
        if self.size > limit:
            raise RootfsError(f"read {self.label}: {self.size} bytes are too many, at most {limit}")
        return self.open().read()


class _Range(io.RawIOBase):
    def __init__(self, blob: Blob) -> None:
        self._fd = blob.file.fileno()
        self._at = blob.offset
        self._end = blob.offset + blob.size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)[: self._end - self._at]
        count = os.preadv(self._fd, [view], self._at)
        self._at += count
        return count


class Hashing(io.RawIOBase):
    """Hands on what it reads and keeps its sha256."""

    def __init__(self, inner: IO[bytes]) -> None:
        import hashlib

        self._inner = cast(io.BufferedIOBase, inner)
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        # One read below at a time: what came before the damage is handed on, and so named right.
        count = self._inner.readinto1(buffer)
        self._hash.update(memoryview(buffer)[:count])
        return count

    def digest(self) -> str:
        """The sha256 of the whole stream in hex; reads what is left of it."""
        while self.read(CHUNK):
            pass
        return self._hash.hexdigest()


class Closed(io.RawIOBase):
    """A tar with the zeros at its end that `umoci insert` and other Go programs forget.

    Only for one whose digest is known: without them a tar may as well be truncated.
    """

    def __init__(self, inner: Hashing) -> None:
        self._inner = inner
        self._zeros = 1024

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        if count := self._inner.readinto(view):
            return count
        count = min(self._zeros, len(view))
        view[:count] = bytes(count)
        self._zeros -= count
        return count


class Streams(NamedTuple):
    plain: Hashing  # decompressed
    raw: Hashing | None  # as stored; None where another program reads it


@contextmanager
def opened(blob: Blob) -> Iterator[Streams]:
    """Read a blob decompressed; a decompressor that fails at the end is a `RootfsError`."""
    kind = blob.compression()
    if kind == "zstd" and (module := _zstd_module()) is None:
        with _zstd_program(blob) as output:
            yield Streams(Hashing(output), None)
        return
    raw = Hashing(blob.open())
    inner: IO[bytes] = cast("IO[bytes]", io.BufferedReader(raw, CHUNK))
    if kind == "gzip":
        import gzip

        inner = cast("IO[bytes]", gzip.GzipFile(fileobj=inner))
    elif kind == "bzip2":
        import bz2

        inner = cast("IO[bytes]", bz2.BZ2File(inner))
    elif kind == "xz":
        import lzma

        inner = cast("IO[bytes]", lzma.open(inner))  # noqa: SIM115 (open as long as the blob)
    elif kind == "zstd":
        inner = module.ZstdFile(inner)
    yield Streams(Hashing(inner), raw)


def _zstd_module() -> Any:  # in the standard library from Python 3.14
    import importlib

    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return None


@contextmanager
def _zstd_program(blob: Blob) -> Iterator[IO[bytes]]:
    import shutil
    import subprocess
    import tempfile

    program = shutil.which("zstd")
    if program is None:
        raise RootfsError(
            f"read {blob.label}: it is compressed with zstd and there is nothing to read it with:"
            " install the zstd program (apt install zstd), or use Python 3.14"
        )
    with tempfile.TemporaryFile() as copy, tempfile.TemporaryFile() as complaints:
        # The program reads to the end of its file, and a layer in an archive ends before that.
        shutil.copyfileobj(blob.open(), copy, CHUNK)
        copy.seek(0)
        process = subprocess.Popen(
            [program, "-dcq"], stdin=copy, stdout=subprocess.PIPE, stderr=complaints
        )
        assert process.stdout is not None
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        finally:
            # Closed first: with nobody to write to it ends, however much it still has.
            process.stdout.close()
            status = process.wait()
        if status:
            complaints.seek(0)
            text = complaints.read().decode(errors="replace").strip() or f"zstd ended with {status}"
            raise RootfsError(f"read {blob.label}: {text}; {BROKEN}")
