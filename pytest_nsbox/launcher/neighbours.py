"""What containers know of each other: the names in /etc/hosts.

The file is written through a descriptor from when it was made, so that one new name costs each
neighbour one small write; who is paused, or busy, has it all the same. Where nothing has run yet
there is nobody to read it, and nothing is written until something will: else each of a thousand
containers would cost a thousand writes.
"""

from __future__ import annotations

import contextlib
import os

from pytest_nsbox import wire
from pytest_nsbox.launcher import names
from pytest_nsbox.launcher.build import changes, hosts_of
from pytest_nsbox.launcher.changes import write_upper
from pytest_nsbox.launcher.container import Container


def own_files(container: Container) -> dict[str, str]:
    """The files of a container that are nsbox's own, as it has last written them."""
    return {**container.own_files, names.HOSTS: b"".join(container.hosts).decode()}


class Neighbours:
    """Those in whom something has run."""

    def __init__(self) -> None:
        self._used: list[Container] = []

    def use(self, container: Container) -> None:
        """Something is about to run in it."""
        if not container.used:
            container.used = True
            self._used.append(container)
            if any(len(interface.bridge.members) > 1 for interface in container.interfaces):
                write_hosts(container)
            else:
                container.heard = changes(container)

    def tell(self, new: Container) -> None:
        """A new name on a network is known to those who were there before."""
        lines = {i.bridge.id: f"{i.bridge.members[i.number]}\n" for i in new.interfaces}
        self._used = [container for container in self._used if container.alive]
        for other in self._used:
            shared = [lines[i.bridge.id] for i in other.interfaces if i.bridge.id in lines]
            if shared and not _append(other, shared):
                write_hosts(other)


def _append(container: Container, lines: list[str]) -> bool:
    """Add to what is there, if that is all as it was left, and these are all that have changed."""
    if container.heard + len(lines) != changes(container):
        return False
    data = "".join(lines).encode()
    with contextlib.suppress(OSError):
        found = os.fstat(container.hosts_fd)
        if found.st_nlink and found.st_size == container.hosts_size:
            container.hosts_size += os.pwrite(container.hosts_fd, data, container.hosts_size)
            container.hosts.append(data)
            container.heard += len(lines)
            return True
    return False


def write_hosts(container: Container) -> None:
    """Write all of it anew."""
    assert container.init is not None
    data = hosts_of(container)
    container.hosts, container.hosts_size = [data], len(data)
    container.heard = changes(container)
    with contextlib.suppress(OSError):
        if os.fstat(container.hosts_fd).st_nlink:
            os.pwrite(container.hosts_fd, data, 0)  # and then cut: it is never seen empty
            os.ftruncate(container.hosts_fd, len(data))
            return
    if container.order.read_only:  # for its init, too
        write_upper(container.places, container.scratch, names.HOSTS, data.decode())
        return
    # another file is there now, which only a process inside gets at as the container does
    mine, theirs = wire.pair()
    with mine, theirs, contextlib.suppress(OSError):
        # one that is paused does not read: nobody else is to wait for it
        container.init.setblocking(False)
        wire.send(container.init, {"op": "hosts", "text": data.decode()}, [theirs.fileno()])
