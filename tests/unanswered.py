"""A filesystem with a file that nobody can ever open: who tries cannot be killed.

It speaks as little of FUSE as that takes (the kernel's Documentation/filesystems/fuse/fuse.rst
and include/uapi/linux/fuse.h). A process that has been killed still waits for the answer to a
request that the server has read, as it would for a device that does not answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import struct
from collections.abc import Iterator
from errno import ENOENT, ENOSYS
from pathlib import Path

from pytest_nsbox.kernel import libc, processes

NAME = "file"
_LOOKUP, _FORGET, _GETATTR, _OPEN, _STATFS, _INIT, _INTERRUPT = 1, 2, 3, 14, 17, 26, 36
_ROOT, _FILE = 1, 2  # node numbers
_IN, _OUT = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
_ALWAYS = 1 << 31  # seconds that an answer holds


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[int]:
    """Mount it there until the end; then all that wait fail. Gives a descriptor to read a byte
    from for each that has begun to wait."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    told, tell = os.pipe()
    try:
        options = f"fd={fd},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other"
        libc.mount("unanswered", str(directory), "fuse", 0, options)
        server = processes.fork_child("unanswered", [fd, tell], lambda: _serve(fd, tell))
    finally:
        os.close(fd)  # the server's is the only one: with it, all requests end
        os.close(tell)
    try:
        yield told
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        libc.umount2(str(directory), libc.MNT_DETACH)
        os.close(told)


def _serve(fd: int, tell: int) -> None:
    while True:
        try:
            request = os.read(fd, 1 << 17)
        except FileNotFoundError:  # who asked has given up
            continue
        _, operation, unique, node, *_ = _IN.unpack_from(request)
        error, answer = 0, b""
        if operation == _INIT:
            answer = struct.pack("=4I2H2I", 7, 31, 0, 0, 0, 0, 4096, 1).ljust(64, b"\0")
        elif operation == _GETATTR:
            answer = struct.pack("=QII", _ALWAYS, 0, 0) + _attributes(node)
        elif operation == _LOOKUP and request[_IN.size :] == f"{NAME}\0".encode():
            answer = struct.pack("=4Q2I", _FILE, 0, _ALWAYS, _ALWAYS, 0, 0) + _attributes(_FILE)
        elif operation == _STATFS:
            answer = bytes(80)
        elif operation == _OPEN:
            os.write(tell, b"x")
            continue
        elif operation in (_FORGET, _INTERRUPT):
            continue
        else:
            error = ENOENT if operation == _LOOKUP else ENOSYS
        os.write(fd, _OUT.pack(_OUT.size + len(answer), -error, unique) + answer)


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o644
    return struct.pack("=6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
