"""What an ELF file says of itself to a loader: elf(5), ld.so(8)."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MACHINES = {
    3: "i386",
    21: "ppc64le",
    22: "s390x",
    40: "arm",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
}
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 1, 5, 10, 15, 29
_LARGEST = 1 << 20  # bytes of any one table


@dataclass(frozen=True, kw_only=True)
class Elf:
    """A program or a shared library."""

    bits: int
    machine: int  # EM_..., as in MACHINES
    loader: str | None = None  # of a program: what loads its libraries
    needed: tuple[str, ...] = ()  # names of libraries
    search: tuple[str, ...] = ()  # directories to look for them first


def read(path: str) -> Elf | None:
    """What is in a file; None where it cannot be read, or is not of this format."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        start = os.pread(fd, 64, 0)
        if start[:4] != b"\x7fELF":
            return None
        return _File(fd, start).read(os.path.dirname(path))
    except (struct.error, ValueError, OSError):
        return None
    finally:
        os.close(fd)


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    length: int


class _File:
    def __init__(self, fd: int, start: bytes) -> None:
        self._fd = fd
        self._start = start
        self._wide = start[4] == 2
        self._order = "<" if start[5] == 1 else ">"
        self._segments = list(self._find_segments())

    def read(self, origin: str) -> Elf:
        loader = None
        needed: list[str] = []
        search: list[str] = []
        for segment in self._segments:
            if segment.kind == _PT_INTERP:
                loader = self._content(segment).rstrip(b"\0").decode()
            elif segment.kind == _PT_DYNAMIC:
                tags = self._tags(segment)
                values = dict(tags)
                needed = [self._string(values, at) for tag, at in tags if tag == _DT_NEEDED]
                # where there is a RUNPATH, the loader does not look at an RPATH
                at = values.get(_DT_RUNPATH, values.get(_DT_RPATH))
                if at is not None:
                    names = self._string(values, at).replace("${ORIGIN}", "$ORIGIN").split(":")
                    search = [name.replace("$ORIGIN", origin) for name in names if name]
        return Elf(
            bits=64 if self._wide else 32,
            machine=struct.unpack_from(self._order + "H", self._start, 18)[0],
            loader=loader,
            needed=tuple(needed),
            search=tuple(search),
        )

    def _find_segments(self) -> Iterator[_Segment]:
        header, at = ("Q14xHH", 32) if self._wide else ("I10xHH", 28)
        table, size, count = struct.unpack_from(self._order + header, self._start, at)
        rows = os.pread(self._fd, min(size * count, _LARGEST), table)
        for at in range(0, len(rows), size):
            if self._wide:
                kind, _, *where, _, length = struct.unpack_from(self._order + "IIQQQQ", rows, at)
            else:
                kind, *where, _, length = struct.unpack_from(self._order + "IIIII", rows, at)
            yield _Segment(kind, where[0], where[1], length)

    def _content(self, segment: _Segment) -> bytes:
        return os.pread(self._fd, min(segment.length, _LARGEST), segment.offset)

    def _tags(self, segment: _Segment) -> list[tuple[int, int]]:
        row = struct.Struct(self._order + ("qQ" if self._wide else "iI"))
        data = self._content(segment)
        return list(row.iter_unpack(data[: len(data) // row.size * row.size]))

    def _string(self, values: dict[int, int], at: int) -> str:
        address = values.get(_DT_STRTAB, 0)
        for kind, offset, start, length in self._segments:
            if kind == _PT_LOAD and start <= address < start + length:
                size = min(values.get(_DT_STRSZ, 0) - at, 1 << 16)
                found = os.pread(self._fd, max(size, 0), offset + address - start + at)
                return found.partition(b"\0")[0].decode()
        return ""
