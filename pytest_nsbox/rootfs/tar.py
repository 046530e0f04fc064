"""Tar archives read with suspicion: damage is an error, never a quiet end of the archive."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any

from pytest_nsbox.rootfs.stream import CHUNK, Blob

Damage = tarfile.TarError


class StrictInfo(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> StrictInfo:
        """Read the next header.

        tarfile takes a damaged header past the first for the end of the archive, and a negative
        size sends it back to what it has read already, for ever.
        """
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"bad header: {error}") from None
        if member.size < 0:
            raise tarfile.ReadError("bad header: negative size")
        return member


def open_stream(stream: IO[bytes]) -> tarfile.TarFile:
    """A tar read once from its beginning to its end."""
    return tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK, **_options(copybufsize=CHUNK))


def open_blob(blob: Blob) -> tarfile.TarFile:
    """An uncompressed tar whose headers are read and whose data are skipped over."""
    blob.file.seek(0)
    return tarfile.open(fileobj=blob.file, mode="r:", **_options())


def _options(**more: Any) -> dict[str, Any]:
    # Whatever the locale is, names are bytes that come back as they were.
    return {"tarinfo": StrictInfo, "encoding": "utf-8", "errors": "surrogateescape", **more}


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order, forgotten as they pass: an archive may have millions."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        yield member


def parts_of(name: str) -> list[bytes]:
    """A member's name as path components below the root, in which there is no `..` left."""
    parts: list[bytes] = []
    for part in name.encode("utf-8", "surrogateescape").split(b"/"):
        if part == b"..":
            if not parts:
                raise ValueError("the name leads out of the root filesystem")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return parts
