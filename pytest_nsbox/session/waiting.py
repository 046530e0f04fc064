"""Waiting for what has no event of its own: a port that opens, a line that is written.

The kernel tells nobody when a socket begins to listen. So between two looks this waits for what it
does tell: the end of the process or of the container, after which there is nothing to wait for.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pytest_nsbox import wire
from pytest_nsbox.errors import WaitError
from pytest_nsbox.session.process import Process, describe_end

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container

_LISTEN = b"0A"  # TCP_LISTEN in proc_net_tcp(5)


def for_port(container: Container, port: int, process: Process | None, timeout: float) -> None:
    """Until something inside listens on a TCP port."""
    process = process or _last(container)
    what = f"port {port} of container {container.name!r}"
    for _ in _looks(timeout, process, container.pidfd):
        ended = process is not None and process.poll() is not None
        if port in listening_ports(container):
            return
        if ended and process is not None:
            raise WaitError(f"{what} cannot open any more: {describe_end(process)}")
    hint = "" if process is None else f"; {describe_end(process)}"
    raise WaitError(f"{what} has not opened within {timeout:g} s{hint}")


def for_log(container: Container, text: str, process: Process | None, timeout: float) -> str:
    """Until a process has written a line with `text` in it."""
    process = process or _last(container)
    if process is None:
        raise WaitError(f"no process of container {container.name!r} whose log could be waited on")
    for _ in _looks(timeout, process, container.pidfd):
        ended = process.poll() is not None
        for line in process.log().splitlines():
            if text in line:
                return line
        if ended:
            raise WaitError(f"{text!r} will not be written any more: {describe_end(process)}")
    raise WaitError(f"{text!r} was not written within {timeout:g} s; {describe_end(process)}")


def until(
    container: Container, condition: Callable[[], Any], process: Process | None, timeout: float
) -> Any:
    """Until a condition is true."""
    for _ in _looks(timeout, process, container.pidfd):
        ended = process is not None and process.poll() is not None
        value = condition()
        if value:
            return value
        if ended and process is not None:
            raise WaitError(f"cannot come true any more: {describe_end(process)}")
        if wire.is_ready(container.pidfd, 0):
            raise WaitError(f"cannot come true any more: {container.why_dead()}")
    name = getattr(condition, "__name__", repr(condition))
    hint = "" if process is None else f"; {describe_end(process)}"
    raise WaitError(f"{name} has not come true within {timeout:g} s{hint}")


def _last(container: Container) -> Process | None:
    return container.processes[-1] if container.processes else None


def _looks(timeout: float, process: Process | None, pidfd: int) -> Iterator[None]:
    """Yields each time it is time to look, the last time when `timeout` is over."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        left = deadline - time.monotonic()
        yield
        if left <= 0:
            return
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        fd = None if process is None else process.fileno()
        if fd is not None:
            poll.register(fd, select.POLLIN)
        poll.poll(min(pause, left) * 1000)
        pause = min(pause * 1.5, 0.05)


def listening_ports(container: Container) -> set[int]:
    """The TCP ports that something inside listens on, of IPv4 and IPv6.

    The kernel's tables are read: a connection would be noticed by the server.
    """
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
