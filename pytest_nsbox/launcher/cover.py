"""What an ordinary user lays over the host's files, so that root inside may write where root does.

A directory of the host's root is nobody's in a user namespace, and what is nobody's cannot be
copied up by an overlay. So there is one more layer, between the host and what a container writes:
the host's upper directories once more, empty and the user's own, and copies of the small files in
/etc. It is made once for a session, before its first container on the host's root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections import deque
from pathlib import Path

from pytest_nsbox.kernel.mountinfo import mount_points
from pytest_nsbox.kernel.userns import overflow_ids

_DEEPEST = 4  # /usr/lib/python3/dist-packages
_MOST = 10_000  # directories; the upper ones come first
_LARGEST = 256 << 10  # bytes of a file in /etc
_NOT = {"/proc", "/sys", "/dev", "/run", "/tmp"}


def place_of_cover() -> Path:
    """Where it may be: not below what it is laid over, or the overlay refuses the two (ELOOP)."""
    for place in (os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm", "/tmp"):
        if f"/{place[1:].partition('/')[0]}" in _NOT and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise OSError(errno.EACCES, "neither $XDG_RUNTIME_DIR nor /dev/shm nor /tmp can be written")


def lay_cover(path: Path) -> None:
    """Make the layer in a directory that is made for it."""
    path.mkdir(mode=0o700)
    mounted = {mount.path for mount in mount_points() if mount.path != "/"}
    waiting = deque(["/"])
    made = 0
    while waiting and made < _MOST:
        directory = waiting.popleft()
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.path in _NOT or entry.path in mounted:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    if found.st_uid != overflow_ids()[0]:
                        continue  # the user's own: an overlay copies that up by itself
                    _copy_directory(entry.path, f"{path}{entry.path}", found.st_mode)
                    made += 1
                    if entry.path.count("/") < _DEEPEST or entry.path.startswith("/etc/"):
                        waiting.append(entry.path)
                elif entry.path.startswith("/etc/"):
                    _copy_file(entry, f"{path}{entry.path}")


def _copy_directory(source: str, target: str, mode: int) -> None:
    os.makedirs(target, exist_ok=True)
    if os.access(source, os.R_OK | os.X_OK):
        os.chmod(target, stat.S_IMODE(mode) | stat.S_IRWXU)
    else:
        os.rmdir(target)


def _copy_file(entry: os.DirEntry[str], target: str) -> None:
    found = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(found.st_mode) and found.st_size <= _LARGEST:
        with contextlib.suppress(PermissionError):
            shutil.copyfile(entry.path, target)
            os.chmod(target, stat.S_IMODE(found.st_mode) | stat.S_IRUSR | stat.S_IWUSR)
