"""Kernel parameters of a network namespace (proc(5), /proc/sys)."""

from __future__ import annotations

import errno
import os

from pytest_nsbox.kernel import libc


def write(path: str, value: str) -> None:
    """Set a parameter in the caller's network namespace. Raises OSError.

    Container engines show /proc/sys read-only; a /proc mounted anew, for the moment of a forked
    child, is not.
    """
    try:
        write_directly(path, value)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        pid = os.fork()
        if pid == 0:
            _in_own_proc(path, value)
        number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if number:
            raise OSError(number, f"write {value!r} to {path}: {os.strerror(number)}") from error


def write_directly(path: str, value: str) -> None:
    """The same where nothing is done about a /proc/sys that is shown read-only."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _in_own_proc(path: str, value: str) -> None:
    status = errno.EIO
    try:
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
        libc.mount("proc", "/proc", "proc", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)
        write_directly(path, value)
        status = 0
    except OSError as error:
        status = error.errno or status
    finally:
        os._exit(status)
