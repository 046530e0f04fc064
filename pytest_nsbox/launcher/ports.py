"""A port of a container on the host's loopback, and one of the host's for a container: a small
forwarding process for each.

A process of its own, so that a slow client never keeps the launcher from its work.
"""

from __future__ import annotations

import contextlib
import ipaddress
import mmap
import os
import signal
import socket

from pytest_nsbox import wire
from pytest_nsbox.kernel import libc, processes
from pytest_nsbox.kernel.namespaces import in_network, open_namespace
from pytest_nsbox.launcher.container import Container
from pytest_nsbox.launcher.forwarder import Forwarder, reach
from pytest_nsbox.launcher.hub import Interface
from pytest_nsbox.launcher.worker import stop
from pytest_nsbox.launcher.zygote import Zygote


def forward_port(container: Container, listener: int, port: int, home: int) -> int:
    """Fork the process that forwards `listener` to `port` inside; it ends with the container."""
    inside = open_namespace("net", container.pid)
    ip = container.interfaces[0].ip if container.interfaces else None
    outside = container.interfaces[0].bridge.hub.netns if container.interfaces else inside

    def connect() -> socket.socket | None:
        """By the network, as a neighbour would; else to the container's own loopback."""
        if ip is not None and (server := reach(ip, port)) is not None:
            return server
        with in_network(inside, outside):
            return reach("127.0.0.1", port)

    def forward() -> None:
        libc.setns(outside, libc.CLONE_NEWNET)
        Forwarder(listener, connect, bool).run()

    pid = processes.fork_child("nsbox-port", {listener, inside, outside}, forward)
    os.close(inside)
    pidfd = os.pidfd_open(pid)
    container.undo.push(f"stop forwarding to port {port}", lambda: stop(pid, pidfd))
    return pid


class HostPorts:
    """Ports of the host's loopback for containers, each for those that asked for it.

    On a network that is the gateway's port of the same number. Its neighbours share the gateway,
    so who may come in is a table, in memory shared with the forwarding process. That one is a
    fork of the zygote, which is still in the host's network namespace.
    """

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote
        self._open: dict[tuple[int, int], _HostPort] = {}  # by bridge and port

    def expose(self, container: Container, port: int, home: int) -> tuple[str, int]:
        """Make a port reachable from a container; returns where. Raises OSError (EADDRINUSE)."""
        if port in container.host_ports:
            return container.host_ports[port]
        host = "127.0.0.1"
        if container.interfaces:
            interface = container.interfaces[0]
            host = interface.bridge.subnet.gateway
            self._at_gateway(container, interface, port, home)
        elif container.order.own_network:
            self._on_own_loopback(container, port, home)
        container.host_ports[port] = (host, port)
        return host, port

    def _at_gateway(self, container: Container, interface: Interface, port: int, home: int) -> None:
        bridge, number = interface.bridge, interface.number
        opened = self._open.get((bridge.id, port))
        if opened is None:
            with in_network(bridge.hub.netns, home):
                listener = socket.create_server((bridge.subnet.gateway, port), backlog=128)
            with listener:
                opened = _HostPort(self._zygote, listener, port, bridge.subnet.ipv4)
            self._open[bridge.id, port] = opened
        opened.allowed[number] = 1

        def close() -> None:
            opened.allowed[number] = 0
            if opened.allowed.find(b"\1") < 0:
                del self._open[bridge.id, port]
                opened.close()

        container.undo.push(f"close port {port} of the host", close)

    def _on_own_loopback(self, container: Container, port: int, home: int) -> None:
        inside = open_namespace("net", container.pid)
        try:
            with in_network(inside, home):
                listener = socket.create_server(("127.0.0.1", port), backlog=128)
        finally:
            os.close(inside)
        with listener:
            pidfd = self._zygote.fork_forwarder(port, [listener.fileno()])
        container.undo.push(f"close port {port} of the host", lambda: end(pidfd))


class _HostPort:
    """One that several containers of a network may have asked for."""

    def __init__(
        self, zygote: Zygote, listener: socket.socket, port: int, network: ipaddress.IPv4Network
    ) -> None:
        table = os.memfd_create("nsbox-allowed", os.MFD_CLOEXEC)
        try:
            os.ftruncate(table, network.num_addresses)
            self.allowed = mmap.mmap(table, network.num_addresses)  # a byte for each host number
            self._pidfd = zygote.fork_forwarder(port, [listener.fileno(), table], str(network))
        finally:
            os.close(table)

    def close(self) -> None:
        end(self._pidfd)
        self.allowed.close()


def end(pidfd: int) -> None:
    """Kill a child of the zygote and wait until it has ended; the kernel reaps it."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    wire.is_ready(pidfd, None)
    os.close(pidfd)
