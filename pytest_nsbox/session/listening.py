"""Which ports are listened on inside: asked of the kernel, without a connection that a server
would notice."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container

_LISTEN = b"0A"  # TCP_LISTEN in proc_net_tcp(5)


def ports(container: Container) -> set[int]:
    """The TCP ports that something inside listens on, of IPv4 and IPv6."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            fd = container.open(table, os.O_RDONLY)
        except FileNotFoundError:  # a kernel without IPv6
            continue
        with os.fdopen(fd, "rb") as file:
            for line in file.read().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    found.add(int(fields[1].rpartition(b":")[2], 16))
    return found
