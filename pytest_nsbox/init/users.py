"""Who a user is inside: read from the container's own passwd(5) and group(5).

The C library is not asked: its name service modules would be loaded from the container.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class User:
    uid: int
    gid: int
    groups: list[int]
    home: str


def find_user(user: object) -> User:
    """The user of `docker run --user`: a name or an id, and after a colon a group.

    Raises OSError (ENOENT) for a name that is not there.
    """
    who, _, group = str(user).partition(":")
    row = next((r for r in _rows("/etc/passwd", 7) if r[0] == who or r[2] == who), None)
    if row is None and not who.isdigit():
        raise FileNotFoundError(2, f"no user {who!r} in the container's /etc/passwd", who)
    uid = int(row[2]) if row else int(who)
    gid = int(row[3]) if row else 0
    groups = [int(r[2]) for r in _rows("/etc/group", 4) if row and row[0] in r[3].split(",")]
    if group:
        found = next((r for r in _rows("/etc/group", 4) if group in (r[0], r[2])), None)
        if found is None and not group.isdigit():
            raise FileNotFoundError(2, f"no group {group!r} in the container's /etc/group", group)
        gid = int(found[2]) if found else int(group)
        groups = []
    return User(uid, gid, groups, row[5] if row else "/")


def _rows(path: str, width: int) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = [line.rstrip("\n").split(":") for line in file]
    except OSError:
        return []
    return [row for row in rows if len(row) == width and row[2].isdigit()]
