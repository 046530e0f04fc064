"""The system calls that Python does not offer. This file imports nothing of ours.

Each wrapper keeps the name and the argument order of its man page, takes `str` and `int`, and
raises `OSError` naming the call and its object.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import struct
import sys
from collections.abc import Iterator

# sched.h
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# sys/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_RELATIME = 1 << 21
MNT_DETACH = 2
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

# sys/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2

_FLAG_NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.startswith(("CLONE_", "MS_")) and isinstance(value, int)
}

_SYS_MOUNT_SETATTR = 442  # the same on all machines
_MOUNT_ATTR_RDONLY, _AT_RECURSIVE = 1, 0x8000
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_OPEN_TREE = 428  # on every architecture
_AT_FDCWD = -100

_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()

# PyDLL would hold the interpreter lock; these calls may block, so the plain loader is right.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
_libc.setdomainname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
_libc.prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4
_libc.pivot_root.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
_libc.capset.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
_libc.eventfd.argtypes = (ctypes.c_uint, ctypes.c_int)
_libc.inotify_init1.argtypes = (ctypes.c_int,)
_libc.syscall.restype = ctypes.c_long
_mount, _unshare, _prctl, _capset = _libc.mount, _libc.unshare, _libc.prctl, _libc.capset
_prctl_text = _libc["prctl"]
_prctl_text.argtypes = (ctypes.c_int, ctypes.c_char_p) + (ctypes.c_ulong,) * 3
_setns = _libc.setns
_fork = ctypes.PyDLL(None, use_errno=True).fork  # which keeps the interpreter lock, as os.fork


def is_loaded(library: str) -> bool:
    """Whether this process has a library of this name (dlopen(3), RTLD_NOLOAD)."""
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def dlopen(path: str) -> None:
    """Load a library for as long as this process lives (dlopen(3))."""
    ctypes.CDLL(path)


def flag_names(flags: int) -> str:
    """The names of the bits in `flags`, as a man page writes them: "MS_BIND|MS_REC"."""
    names = [name for bit, name in sorted(_FLAG_NAMES.items()) if flags & bit]
    return "|".join(names) or "0"


def _check(result: int, operation: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{operation}: {os.strerror(number)}")
    return result


def fork() -> int:
    """fork(2), for a process of one thread: without what Python does in the child, which is to
    forget the other ones. That writes to a hundred pages, which are then no longer shared."""
    return _check(_fork(), "fork")


def fork_first(own: int) -> int:
    """Fork the first process of a new PID namespace; the caller's later children are to be in its
    `own` one, a descriptor, again (unshare(2), fork(2), setns(2))."""
    if _unshare(CLONE_NEWPID) < 0:
        _check(-1, "unshare CLONE_NEWPID")
    pid: int = _fork()
    if pid == 0:
        return 0
    number = ctypes.get_errno()
    # what a kernel short of memory refuses is tried again; astray, no later fork would work
    if _setns(own, CLONE_NEWPID) < 0 and _setns(own, CLONE_NEWPID) < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if pid < 0:
        raise OSError(number, f"fork: {os.strerror(number)}")
    return pid


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Within, what would change the calling process does nothing, and succeeds."""
    names = ("_mount", "_unshare", "_prctl", "_capset")
    real = {name: globals()[name] for name in names}
    globals().update(dict.fromkeys(names, lambda *_: 0))
    try:
        yield
    finally:
        globals().update(real)


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones (unshare(2))."""
    if _unshare(flags) < 0:
        _check(-1, f"unshare {flag_names(flags)}")


def setns(fd: int, flags: int) -> None:
    """Enter the namespaces `flags` of what `fd` refers to, a pidfd or a namespace (setns(2))."""
    if _setns(fd, flags) < 0:
        _check(-1, f"setns {flag_names(flags)}")


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    # not by os.fsencode, which does the same and is ten pages of memory more in each init
    result = _mount(
        source.encode(_ENCODING, _ERRORS),
        target.encode(_ENCODING, _ERRORS),
        fstype and fstype.encode(),
        flags,
        data.encode(_ENCODING, _ERRORS) or None,
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(
            number,
            f"mount {fstype or flag_names(flags)} {source} on {target}"
            + (f" ({data})" if data else "")
            + f": {mount_strerror(number, fstype)}",
        )


def mount_strerror(number: int, fstype: str | None) -> str:
    """What an error number of mount(2) means, where the usual text would mislead."""
    if number == errno.ENOSPC:
        return "the limit on mounts is reached; raise the sysctl fs.mount-max"
    if number == errno.ENODEV and fstype:
        return f"this kernel has no {fstype} filesystem; load its module: modprobe {fstype}"
    if number == errno.EINVAL and fstype == "overlay":
        return (
            "the overlay was refused: an upper directory on overlayfs, "
            "or a lower directory with locked mounts below it"
        )
    if number == errno.ELOOP:
        return "a symbolic link stands where a mount point is needed"
    return os.strerror(number)


def make_read_only(path: str) -> None:
    """Make a mount and all that is mounted below it read-only (mount_setattr(2), Linux 5.12)."""
    attributes = struct.pack("=4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(-100),  # AT_FDCWD
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(_AT_RECURSIVE),
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
    )
    _check(result, f"mount_setattr {path}")


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2); umount(2) would take the flags and lose them."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    result = _libc.pivot_root(os.fsencode(new_root), os.fsencode(put_old))
    _check(result, f"pivot_root {new_root} {put_old}")


def open_tree(path: str, flags: int) -> int:
    """open_tree(2): with OPEN_TREE_CLONE, a mount without those below it, attached nowhere."""
    result = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(flags),
    )
    return _check(result, f"open_tree {path}")


def sethostname(name: str) -> None:
    """sethostname(2)."""
    text = name.encode()
    _check(_libc.sethostname(text, len(text)), f"sethostname {name!r}")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2)."""
    result: int = _prctl(option, arg2, arg3, arg4, arg5)
    return result if result >= 0 else _check(result, f"prctl {option} {arg2}")


def is_child_subreaper() -> bool:
    """Whether orphans below the calling process come to it (PR_GET_CHILD_SUBREAPER)."""
    found = ctypes.c_int()
    prctl(PR_GET_CHILD_SUBREAPER, ctypes.addressof(found))
    return bool(found.value)


def set_process_name(name: str) -> None:
    """The name that ps(1) shows for the calling process, at most 15 bytes (PR_SET_NAME)."""
    _check(_prctl_text(PR_SET_NAME, name.encode(), 0, 0, 0), "prctl PR_SET_NAME")


def eventfd(initial: int = 0, flags: int = os.O_CLOEXEC) -> int:
    """eventfd(2): a counter that poll(2) can wait for."""
    return _check(_libc.eventfd(initial, flags), "eventfd")


def inotify_init1(flags: int = os.O_CLOEXEC) -> int:
    """inotify_init1(2): a descriptor that tells of changes to files."""
    return _check(_libc.inotify_init1(flags), "inotify_init1")


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the capabilities of the calling thread, each a bit mask (capset(2))."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    words = []
    for shift in (0, 32):
        words += [mask >> shift & 0xFFFFFFFF for mask in (effective, permitted, inheritable)]
    data = struct.pack("=6I", *words)
    if _capset(header, data) < 0:
        _check(-1, "capset")


def seccomp_set_filter(program: bytes) -> None:
    """Filter the calling thread's system calls from here on by a BPF program (seccomp(2)).

    `program` is the packed array of `struct sock_filter`.
    """
    result = _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, sock_fprog(program), 0, 0)
    _check(result, "prctl PR_SET_SECCOMP")


@functools.cache
def sock_fprog(program: bytes) -> int:
    """Where the `struct sock_fprog` of a program is. Worked out before a fork it need not be in
    the child."""
    code = ctypes.create_string_buffer(program, len(program))
    prog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    fprog = ctypes.create_string_buffer(prog, len(prog))
    _programs.append((code, fprog))
    return ctypes.addressof(fprog)


_programs: list[object] = []  # what there are addresses of has to stay
