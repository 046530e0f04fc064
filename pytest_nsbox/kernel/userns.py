"""User namespaces: who is who inside one (user_namespaces(7))."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

EVERY_ID = 4294967295  # (uid_t) -1 is no id
_CAP_SYS_ADMIN = 21
_FIRST = 0xEFFFFFFD  # PROC_USER_INIT_INO of include/linux/proc_ns.h


class Extent(NamedTuple):
    """One line of uid_map: `size` ids from `inside` on are those from `outside` on, of the
    user namespace above."""

    inside: int
    outside: int
    size: int


def extents(kind: str, pid: int | str = "self") -> list[Extent]:
    """The map of a process's user namespace, `kind` being "uid" or "gid"."""
    with open(f"/proc/{pid}/{kind}_map", encoding="ascii") as file:
        return [Extent(*map(int, line.split())) for line in file]


def onto_itself(kind: str) -> str:
    """The map for a user namespace below the caller's own, in which every id means the same."""
    return "".join(f"{each.inside} {each.inside} {each.size}\n" for each in extents(kind))


def maps(kind: str, id: int) -> bool:
    """Whether an id is anybody's here: an owner outside the map shows as the overflow id."""
    return any(each.inside <= id < each.inside + each.size for each in extents(kind))


@functools.cache
def highest(kind: str) -> int:
    """The highest id that there is here."""
    return max(each.inside + each.size - 1 for each in extents(kind))


@functools.cache
def is_complete() -> bool:
    """Whether the caller's user namespace has all ids, as the first one has."""
    return all(sum(each.size for each in extents(kind)) == EVERY_ID for kind in ("uid", "gid"))


@functools.cache
def is_first() -> bool:
    """Whether the caller's user namespace is the machine's: root of another one is root of a
    container, to whom the kernel gives less."""
    return os.stat("/proc/self/ns/user").st_ino == _FIRST


@functools.cache
def overflow_ids() -> tuple[int, int]:
    """The user and group that stand for all that are not mapped (proc(5))."""
    numbers = []
    for kind in ("uid", "gid"):
        with open(f"/proc/sys/kernel/overflow{kind}", encoding="ascii") as file:
            numbers.append(int(file.read()))
    return numbers[0], numbers[1]


@functools.cache
def may_set_groups() -> bool:
    """With a single id mapped by an ordinary user, setgroups(2) is forbidden."""
    with open("/proc/self/setgroups", encoding="ascii") as file:
        return file.read().strip() == "allow"


def is_administrator() -> bool:
    """Whether the calling process has CAP_SYS_ADMIN, effective."""
    with open("/proc/self/status", encoding="ascii") as status:
        mask = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return os.geteuid() == 0 and bool(mask >> _CAP_SYS_ADMIN & 1)
