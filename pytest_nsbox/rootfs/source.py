"""What a source is: told from its name and from the first bytes of a file."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Literal, NamedTuple, cast

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.model.rootfs import HOST
from pytest_nsbox.rootfs.stream import Blob, opened

Kind = Literal["host", "directory", "tar", "docker-archive", "oci-archive", "oci-layout", "skopeo"]

if TYPE_CHECKING:
    import tarfile

ALLOWED = (
    "a root filesystem is 'host', a directory, a tar of one, an archive of docker save,"
    " an OCI archive or layout, or docker://NAME and the like"
)
# containers-transports(5)
TRANSPORT = re.compile(
    r"(docker://|docker-daemon:|docker-archive:|oci:|oci-archive:|dir:|containers-storage:|ostree:"
    r"|sif:|tarball:)."
)
REGISTRY = "docker://"
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
# What a root filesystem has at its top and an image archive has not.
TOP_OF_ROOT = frozenset(
    b"bin boot dev etc home lib lib32 lib64 media mnt opt proc"
    b" root run sbin srv sys tmp usr var".split()
)


class Source(NamedTuple):
    path: str  # absolute
    choice: str | None  # what follows the `#`: one image of several


def split(source: str) -> Source:
    """The path of a source and the image chosen in it: `image.tar#name:tag`."""
    path, mark, choice = source.rpartition("#")
    if mark and path and not os.path.lexists(source):
        return Source(os.path.abspath(path), choice)
    return Source(os.path.abspath(source), None)


def is_transport(source: str) -> bool:
    return TRANSPORT.match(source) is not None


def kind_of(source: str) -> Kind:
    """Classify a source without unpacking it; `RootfsError` where it is none.

    Of an archive this reads the headers until they tell, as a rule the first few.
    """
    cheap = by_name(source)
    if cheap is not None:
        return cheap
    path, choice = split(source)
    with open_archive(path) as blob:
        kind = _kind_of_archive(blob)
    if choice and kind == "tar":
        raise RootfsError(
            f"rootfs {source!r}: {path} is one root filesystem, not an archive of images:"
            f" leave out '#{choice}'"
        )
    return kind


def check(source: str) -> None:
    """Raise `RootfsError` for what can be told wrong at once: for the collection of tests."""
    kind = by_name(source)
    if kind == "skopeo":
        require_skopeo(source)
    if kind is not None:
        return
    path, _ = split(source)
    with open_archive(path) as blob:
        if blob.compression() is None and os.pread(blob.file.fileno(), 5, 257) != b"ustar":
            _kind_of_archive(blob)  # older tars have no magic: their checksum tells


def by_name(source: str) -> Kind | None:
    """The kind of a source that is not an archive file; None for one that may be."""
    if source == HOST:
        return "host"
    if is_transport(source):
        return "skopeo"
    if not source:
        raise RootfsError(f"rootfs '': empty; {ALLOWED}")
    if SCHEME.match(source):
        raise RootfsError(f"rootfs {source!r}: no such transport; {ALLOWED}")
    path, choice = split(source)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):
            return None
        names = os.listdir(path)
    except FileNotFoundError:
        raise RootfsError(
            f"rootfs {source!r}: {path} does not exist; {ALLOWED}"
            + ("" if "/" in source else f" (from a registry: docker://{source})")
        ) from None
    except OSError as error:
        raise RootfsError(f"rootfs {source!r}: read {path}: {error.strerror}; {ALLOWED}") from None
    if "oci-layout" in names:
        return "oci-layout"
    if os.path.realpath(path) == "/":
        return "host"
    if choice:
        raise RootfsError(
            f"rootfs {source!r}: {path} is a directory, not an archive of images:"
            f" leave out '#{choice}'"
        )
    if not names:
        raise RootfsError(f"rootfs {source!r}: the directory {path} is empty; {ALLOWED}")
    return "directory"


def require_skopeo(source: str) -> str:
    """The path of skopeo."""
    import shutil

    if program := shutil.which("skopeo"):
        return program
    raise RootfsError(
        f"rootfs {source!r}: the program skopeo, which copies images, is not installed:"
        " apt install skopeo (or dnf, apk add), or docker save the image to a file and name that"
    )


@contextmanager
def open_archive(path: str) -> Iterator[Blob]:
    """The file of an archive; `RootfsError` where it cannot be one."""
    try:
        # Without O_NONBLOCK the open of a FIFO waits for a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise RootfsError(f"rootfs {path!r}: open: {error.strerror}; {ALLOWED}") from None
    with file:
        blob = Blob.of(file, path)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise RootfsError(f"rootfs {path!r}: neither a file nor a directory; {ALLOWED}")
        if not blob.size:
            raise RootfsError(f"rootfs {path!r}: the file is empty; {ALLOWED}")
        yield blob


def _kind_of_archive(blob: Blob) -> Kind:
    from pytest_nsbox.rootfs import tar

    seen: set[bytes] = set()
    try:
        if blob.compression() is None:
            with tar.open_blob(blob) as archive:
                _scan(archive, seen)
        else:
            with opened(blob) as streams:
                with tar.open_stream(cast("IO[bytes]", streams.plain)) as archive:
                    _scan(archive, seen)
    except RootfsError:
        raise
    except Exception as error:
        # tarfile, zlib, lzma and bz2 each have errors of their own.
        raise RootfsError(
            f"rootfs {blob.label!r}: not a tar archive ({error}); {ALLOWED}"
        ) from None
    if not seen:
        raise RootfsError(f"rootfs {blob.label!r}: the archive is empty; {ALLOWED}")
    if seen & TOP_OF_ROOT:
        return "tar"
    if b"manifest.json" in seen:  # docker save writes an oci-layout too
        return "docker-archive"
    if {b"oci-layout", b"index.json"} <= seen:
        return "oci-archive"
    return "tar"


def _scan(archive: tarfile.TarFile, seen: set[bytes]) -> None:
    from pytest_nsbox.rootfs import tar

    for member in tar.members(archive):
        try:
            parts = tar.parts_of(member.name)
        except ValueError:
            continue  # refused when it is unpacked, where the error can say more
        seen.add(parts[0] if parts else b".")
        if parts and parts[0] in TOP_OF_ROOT:
            return
