"""What the launcher holds of a container, and its end."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from dataclasses import dataclass, field

from pytest_nsbox import wire
from pytest_nsbox.kernel.cgroup import Cgroup
from pytest_nsbox.kernel.namespaces import open_namespace
from pytest_nsbox.kernel.netlink import Batch, Netlink
from pytest_nsbox.kernel.processes import describe
from pytest_nsbox.launcher.hub import Interface
from pytest_nsbox.launcher.undo import Undo
from pytest_nsbox.model.limits import Stats
from pytest_nsbox.model.order import Order
from pytest_nsbox.model.place import Place

UNTIL_DEAD = 5.0  # seconds that a killed container has to end in


@dataclass
class Container:
    """It is filled while it is built, and emptied by its `undo`."""

    id: int
    order: Order
    undo: Undo
    cgroup: Cgroup | None = None
    layer: str | None = None  # the directory on disk that keeps what it writes
    interfaces: list[Interface] = field(default_factory=list)
    pid: int = 0
    pidfd: int = -1
    init: socket.socket | None = None  # the launcher's own line to init
    line: socket.socket | None = None  # the session's, until it is handed over
    connected: bool = False  # with its networks, by init, which has been told to be
    asked: list[tuple[Netlink | None, Batch]] = field(default_factory=list)  # of the kernel, so far
    alive: bool = False
    reason: str = ""  # why it died, where that is known
    last: Stats | None = None  # taken before it was killed
    mounts: int = -1  # its mount namespace, once it is killed
    places: list[Place] = field(default_factory=list)  # where it can write
    scratch: int = -1  # the root of the filesystem in memory that keeps what it writes
    paused: bool = False  # as the session has asked for
    host_ports: dict[int, tuple[str, int]] = field(default_factory=dict)  # where they are for it
    own_paths: dict[str, str] = field(default_factory=dict)  # path: where it is (Tree)
    own_files: dict[str, str] = field(default_factory=dict)  # path: text
    hosts: list[bytes] = field(default_factory=list)  # what is in /etc/hosts, bit by bit
    hosts_size: int = 0
    hosts_fd: int = -1
    used: bool = False  # something has run in it
    heard: int = 0  # of how many changes of its networks there was a word in it
    until: float = 0.0  # when, on the monotonic clock, its death is waited for no longer

    def kill(self, reason: str) -> None:
        """SIGKILL to PID 1; the kernel takes every other process of the namespace with it."""
        if self.alive:
            self.reason = self.reason or reason
            self.until = self.until or time.monotonic() + UNTIL_DEAD
            if self.cgroup is not None and self.last is None:
                with contextlib.suppress(OSError):
                    self.last = self.cgroup.stats()
            if self.mounts < 0:
                with contextlib.suppress(OSError):  # then they go while its end is waited for
                    self.mounts = open_namespace("mnt", self.pid)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            if self.cgroup is not None:  # on version 1 a frozen process does not die
                with contextlib.suppress(OSError):
                    self.cgroup.thaw()

    def reap(self) -> None:
        """Wait until PID 1, and so every process of the container, is gone."""
        if not self.alive:
            return
        if not wire.is_ready(self.pidfd, max(self.until - time.monotonic(), 0)):
            members = () if self.cgroup is None else self.cgroup.members()
            raise OSError(16, f"killed, but does not end: {describe(members or {self.pid})}")
        if self.cgroup is not None and self.last is None:
            with contextlib.suppress(OSError):
                self.last = self.cgroup.stats()
        self.alive = False  # the zygote is its parent, and reaps it

    def has_ended(self) -> bool:
        return self.alive and wire.is_ready(self.pidfd, 0)

    def state(self) -> wire.Message:
        """What there is to say about it, dead or alive."""
        stats = self.last
        if self.cgroup is not None and self.alive and stats is None:
            stats = self.cgroup.stats()
        return {
            "alive": self.alive and not self.reason,
            "reason": self.reason,
            "stats": None if stats is None else vars(stats),
        }
