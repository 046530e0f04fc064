"""What the calling thread may do as root (capabilities(7), prctl(2))."""

from __future__ import annotations

import errno
import functools

from pytest_nsbox.kernel import libc
from pytest_nsbox.model.capabilities import NUMBERS, mask

_PR_CAPBSET_READ = 23


def no_new_privs() -> None:
    """From here on no execve(2) gives more than the caller has: no setuid, no file capabilities."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)


@functools.cache
def last() -> int:
    """The highest capability that this kernel knows.

    It is found by asking for each: /proc may not be mounted, or be a container's.
    """
    number = max(NUMBERS.values())
    while not _known(number):
        number -= 1
    while _known(number + 1):
        number += 1
    return number


def drop_to(keep: frozenset[str]) -> None:
    """Give up, for good, every capability of the calling thread that is not in `keep`.

    Of `keep` the thread has then, effective and permitted, what it had before; its inheritable and
    ambient sets are empty. Needs CAP_SETPCAP where the bounding set shrinks. A kernel may know
    capabilities that have no name here yet: they go too.
    """
    # The bounding set comes first: shrinking it takes CAP_SETPCAP, which may not be kept.
    # It has to shrink, for execve() gives root all that is in it.
    wanted, dropped = split(keep)
    for number in dropped:
        _drop_from_bounding_set(number)
    # The ambient set is kept within the inheritable one: it ends empty too.
    try:
        libc.capset(wanted, wanted, 0)
    except PermissionError:
        # Some of it is not permitted, so it cannot be had.
        held = wanted & _permitted()
        libc.capset(held, held, 0)


@functools.cache
def split(keep: frozenset[str]) -> tuple[int, list[int]]:
    """The mask of what is kept, and the numbers of what is not."""
    wanted = mask(keep)
    return wanted, [number for number in range(last() + 1) if not wanted >> number & 1]


def _drop_from_bounding_set(number: int) -> None:
    try:
        libc.prctl(libc.PR_CAPBSET_DROP, number)
    except PermissionError:
        # The kernel asks for CAP_SETPCAP before it looks whether there is anything to drop.
        if libc.prctl(_PR_CAPBSET_READ, number):
            raise


def _known(number: int) -> bool:
    try:
        libc.prctl(_PR_CAPBSET_READ, number)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _permitted() -> int:
    with open("/proc/thread-self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm:"))
