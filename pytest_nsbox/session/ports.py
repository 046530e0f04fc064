"""Ports of a container, and of the test for a container."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from pytest_nsbox import wire
from pytest_nsbox.errors import ContainerDied, SpecError

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container


def connect(container: Container, port: int, timeout: float | None) -> socket.socket:
    """A connection to a port inside: on its network, or else on its own loopback."""
    if wire.is_ready(container.pidfd, 0):
        raise container.why_dead()
    reply, fds = container.session.request("socket", id=container.id, type=socket.SOCK_STREAM)
    if reply["ip"] is not None:
        try:
            return _connected(fds[0], (reply["ip"], port), timeout)
        except ConnectionRefusedError:
            pass
    message = {"op": "socket", "family": int(socket.AF_INET), "type": int(socket.SOCK_STREAM)}
    (fd,) = container.request_init(message)
    try:
        return _connected(fd, ("127.0.0.1", port), timeout)
    except ConnectionRefusedError:
        raise ConnectionRefusedError(
            errno.ECONNREFUSED, f"nothing listens on port {port} of container {container.name!r}"
        ) from None


def _connected(fd: int, address: tuple[str, int], timeout: float | None) -> socket.socket:
    sock = socket.socket(fileno=fd)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def publish(container: Container, port: int, host_port: int) -> tuple[str, int]:
    """A port of the host's loopback that leads to one inside."""
    with socket.create_server(("127.0.0.1", host_port), backlog=128) as listener:
        container.session.request("publish", [listener.fileno()], id=container.id, port=port)
        host, chosen = listener.getsockname()
        return str(host), int(chosen)


def expose_host(container: Container, port: int) -> tuple[str, int]:
    """An address inside that leads to a port of the host's loopback."""
    if not 0 < int(port) < 1 << 16:
        raise SpecError(f"port {port!r} is not a number from 1 to 65535")
    try:
        reply, _ = container.session.request("expose_host", id=container.id, port=int(port))
    except ContainerDied as error:
        raise (container.death() or error) from None
    host, chosen = reply["address"]
    return str(host), int(chosen)
