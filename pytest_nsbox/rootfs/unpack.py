"""Unpacks one tar into an empty directory, in a child that cannot see anything else."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from typing import IO, Any, NoReturn, cast

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.rootfs.stream import BROKEN, Blob, Closed, Streams, opened


@dataclass(frozen=True)
class Digests:
    """sha256 in hex, of the tar and of the bytes as they were stored."""

    plain: str
    raw: str | None  # None where the zstd program read them


def unpack(blob: Blob, into: str, *, whiteouts: bool) -> Digests:
    """Unpack `blob` into the existing, empty directory `into`.

    `whiteouts` says that it is a layer of an image, whose `.wh.` names have their meaning, and
    whose digest the caller compares.
    Raises `RootfsError`, which names the archive and the entry; `into` is then half full.
    """
    # Before the fork: from inside the new root there is nothing to import from.
    from pytest_nsbox.rootfs import extract, tar  # noqa: F401

    with opened(blob) as streams:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(streams, into, whiteouts, writer)
        os.close(writer)
        try:
            with open(reader, "rb") as pipe:
                reply = pipe.read()
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            _, status = os.waitpid(pid, 0)
        if not reply:
            code = os.waitstatus_to_exitcode(status)
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise RootfsError(f"unpack {blob.label}: the unpacking process was ended by {how}")
        return _result(blob, json.loads(reply))


def _result(blob: Blob, reply: dict[str, Any]) -> Digests:
    if "error" not in reply:
        return Digests(plain=reply["plain"], raw=reply["raw"])
    where = f"entry {reply['entry']!r}" if reply["entry"] is not None else "at its beginning"
    cure = "" if reply["refused"] else f"; {BROKEN}"
    raise RootfsError(f"unpack {blob.label}: {where}: {reply['error']}{cure}")


def _child(streams: Streams, into: str, whiteouts: bool, writer: int) -> NoReturn:
    from pytest_nsbox.rootfs import extract, tar

    extraction = extract.Extraction(whiteouts=whiteouts)
    reply: dict[str, Any]
    try:
        layer = os.stat(into)
        os.chroot(into)
        os.chdir("/")
        if not os.path.samestat(os.stat("/"), layer):
            # All that follows writes to `/`, and it must never be the host's.
            raise ValueError("the layer did not become the root directory")
        os.umask(0o022)
        stream = Closed(streams.plain) if whiteouts else streams.plain
        with tar.open_stream(cast("IO[bytes]", stream)) as archive:
            extraction.run(archive)
        reply = {
            "plain": streams.plain.digest(),
            "raw": streams.raw.digest() if streams.raw else None,
        }
    except BaseException as error:
        # An error number is the system's word, a ValueError ours; the rest is about the bytes.
        system = error.strerror if isinstance(error, OSError) else None
        reply = {
            "error": system or str(error) or type(error).__name__,
            "entry": extraction.entry,
            "refused": system is not None or isinstance(error, ValueError),
        }
    try:
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(reply).encode())
    finally:
        os._exit(0)
