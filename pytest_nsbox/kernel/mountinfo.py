"""What is mounted, as proc_pid_mountinfo(5) shows it."""

from __future__ import annotations

import os
import re
import select
from dataclasses import dataclass


@dataclass(frozen=True)
class MountPoint:
    """One line of /proc/PID/mountinfo (proc(5))."""

    path: str
    fstype: str
    read_only: bool
    id: str
    parent: str  # the id of the mount that it is on
    device: str  # of its filesystem, as major:minor
    root: str  # the directory of that which is shown
    idmapped: bool


def mount_points() -> list[MountPoint]:
    """What is mounted in this mount namespace, outermost first, each path once."""
    found: dict[str, MountPoint] = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, after = line.split(" - ", 1)
            id, parent, device, root, path, flags = before.split(" ")[:6]
            path, options = unescape(path), flags.split(",")
            found[path] = MountPoint(
                path=path,
                fstype=after.split(" ", 1)[0],
                read_only=options[0] == "ro",
                id=id,
                parent=parent,
                device=device,
                root=unescape(root),
                idmapped="idmapped" in options,
            )
    return sorted(found.values(), key=lambda mount: mount.path)


def unescape(field: str) -> str:
    """A field with its octal escapes resolved (proc_pid_mountinfo(5))."""
    if "\\" not in field:
        return field
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


class MountWatch:
    """The mount points, read again only when the kernel says that they have changed.

    A mountinfo that is held open polls as an exception after a change (proc_pid_mountinfo(5)).
    """

    def __init__(self) -> None:
        self._fd = -1
        self._pid = 0
        self._found: list[MountPoint] = []

    def now(self) -> list[MountPoint]:
        """What is mounted, the same object until that changes. A forked child is given what its
        parent knew."""
        if self._pid and self._pid != os.getpid():
            return self._found
        if self._fd < 0:
            self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            self._pid = os.getpid()
        elif self._found and not self._changed():
            return self._found
        self._found = []  # a change is told once, and reading may fail
        self._found = mount_points()
        return self._found

    def _changed(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLPRI)
        return bool(poll.poll(0))
