"""Looks a path up in a stack of layers as the overlay over them would, without mounting it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

LINKS = 40  # as path_resolution(7)


def resolve(layers: Sequence[str], path: str) -> tuple[str, str | None]:
    """Follow `path` from the merged root, symbolic links and all.

    Returns the path it leads to in the container, and the file that this is below one of the
    layers (lowest first), None where there is nothing. Raises OSError (ELOOP) for links
    in a circle.
    """
    done: list[str] = []
    todo = path.split("/")
    links = 0
    while todo:
        part = todo.pop(0)
        if part == "..":
            del done[-1:]
        elif part not in ("", "."):
            done.append(part)
            found = _lookup(layers, done)
            if found is None:
                break
            if os.path.islink(found):
                links += 1
                if links > LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(found)
                del done[0 if target.startswith("/") else -1 :]
                todo = [*target.split("/"), *todo]
    return "/" + "/".join([*done, *todo]), _lookup(layers, done)


def _lookup(layers: Sequence[str], parts: list[str]) -> str | None:
    """The uppermost file of this name, whose directories are none of them links."""
    merged = list(reversed(layers))  # the directories that make up the one we are in
    for part in parts:
        below: list[str] = []
        for directory in merged:
            path = os.path.join(directory, part)
            try:
                status = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                break
            if not below or stat.S_ISDIR(status.st_mode):
                below.append(path)
            if not stat.S_ISDIR(status.st_mode) or is_opaque(path):
                break
        merged = below
    return merged[0] if merged else None


def is_opaque(path: str) -> bool:
    """Whether a directory of a layer hides those below it, by either of the overlay's names."""
    return not {"trusted.overlay.opaque", "user.overlay.opaque"}.isdisjoint(os.listxattr(path))
