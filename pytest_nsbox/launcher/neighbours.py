"""What containers know of each other: the names in /etc/hosts.

The file is written through a descriptor from when it was made, so that one new name costs each
neighbour one small write; who is paused, or busy, has it all the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from pytest_nsbox import wire
from pytest_nsbox.launcher import names
from pytest_nsbox.launcher.build import Container, departed, known_names
from pytest_nsbox.launcher.changes import write_upper


def own_files(container: Container) -> dict[str, str]:
    """The files of a container that are nsbox's own, as it has last written them."""
    return {**container.own_files, names.HOSTS: b"".join(container.hosts).decode()}


def tell_neighbours(new: Container, everyone: Iterable[Container]) -> None:
    """A new name on a network is known to those who were there before."""
    lines = {i.bridge.id: f"{i.ip}\t{new.order.name}\n".encode() for i in new.interfaces}
    for other in everyone:
        if other is new or not other.alive or other.init is None:
            continue
        shared = [i.bridge for i in other.interfaces if i.bridge.id in lines]
        if not shared:
            continue
        # where nobody has left, nothing in it is wrong
        grown = other.departed == departed(other)
        if not (grown and _append(other, b"".join(lines[bridge.id] for bridge in shared))):
            write_hosts(other)


def _append(container: Container, line: bytes) -> bool:
    """Add to what is there, if that is all as it was left."""
    with contextlib.suppress(OSError):
        found = os.fstat(container.hosts_fd)
        if found.st_nlink and found.st_size == container.hosts_size:
            container.hosts_size += os.pwrite(container.hosts_fd, line, container.hosts_size)
            container.hosts.append(line)
            return True
    return False


def write_hosts(container: Container) -> None:
    """Write all of it anew."""
    assert container.init is not None
    text = names.hosts(known_names(container), container.order.hosts)
    data = text.encode()
    container.hosts, container.hosts_size = [data], len(data)
    container.departed = departed(container)
    with contextlib.suppress(OSError):
        if os.fstat(container.hosts_fd).st_nlink:
            os.pwrite(container.hosts_fd, data, 0)  # and then cut: it is never seen empty
            os.ftruncate(container.hosts_fd, len(data))
            return
    if container.order.read_only:  # for its init, too
        write_upper(container.places, container.scratch, names.HOSTS, text)
        return
    # another file is there now, which only a process inside gets at as the container does
    mine, theirs = wire.pair()
    with mine, theirs, contextlib.suppress(OSError):
        # one that is paused does not read: nobody else is to wait for it
        container.init.setblocking(False)
        wire.send(container.init, {"op": "hosts", "text": text}, [theirs.fileno()])
