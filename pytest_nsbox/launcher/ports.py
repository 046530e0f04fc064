"""A port of a container on the host's loopback: a small forwarding process per published port.

A process of its own, so that a slow client never keeps the launcher from its work.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket

from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.namespaces import open_namespace
from pytest_nsbox.launcher.build import Container
from pytest_nsbox.launcher.worker import stop
from pytest_nsbox.launcher.zygote import close_all_but

_CHUNK = 1 << 18


def forward_port(container: Container, listener: int, port: int, home: int) -> int:
    """Fork the process that forwards `listener` to `port` inside; it ends with the container."""
    inside = open_namespace("net", container.pid)
    ip = container.interfaces[0].ip if container.interfaces else None
    outside = container.interfaces[0].bridge.hub.netns if container.interfaces else inside
    pid = os.fork()
    if pid == 0:
        try:
            libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
            libc.set_process_name("nsbox-port")
            close_all_but({listener, inside, outside})
            libc.setns(outside, libc.CLONE_NEWNET)
            _Forwarder(listener, ip, port, inside, outside).run()
        finally:
            os._exit(1)
    os.close(inside)
    pidfd = os.pidfd_open(pid)
    container.undo.push(f"stop forwarding to port {port}", lambda: stop(pid, pidfd))
    return pid


class _Forwarder:
    """Copies bytes both ways between each accepted connection and one to the container."""

    def __init__(self, listener: int, ip: str | None, port: int, inside: int, outside: int) -> None:
        self.listener = socket.socket(fileno=listener)
        self.listener.setblocking(False)
        self.ip, self.port, self.inside, self.outside = ip, port, inside, outside
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)

    def run(self) -> None:
        while True:
            for key, events in self.selector.select():
                if key.data is None:
                    self._accept()
                else:
                    key.data.step(key.fileobj, events)

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:
            return
        server = self._connect()
        if server is None:
            # refused inside, refused here: a reset, not an empty answer
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _Connection(self.selector, client, server)

    def _connect(self) -> socket.socket | None:
        """By the network, as a neighbour would; else to the container's own loopback."""
        if self.ip is not None:
            with contextlib.suppress(OSError):
                return socket.create_connection((self.ip, self.port), timeout=10)
        libc.setns(self.inside, libc.CLONE_NEWNET)
        try:
            return socket.create_connection(("127.0.0.1", self.port), timeout=10)
        except OSError:
            return None
        finally:
            libc.setns(self.outside, libc.CLONE_NEWNET)


class _Connection:
    """Two sockets, and what has been read from each but not yet written to the other."""

    def __init__(
        self, selector: selectors.BaseSelector, client: socket.socket, server: socket.socket
    ) -> None:
        self.selector = selector
        self.other = {client: server, server: client}
        self.pending = {client: b"", server: b""}  # to be written to the key
        self.reading = {client, server}
        for sock in self.other:
            selector.register(sock, selectors.EVENT_READ, self)

    def step(self, sock: socket.socket, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._write(sock)
            if events & selectors.EVENT_READ:
                self._read(sock)
            for each in self.other:
                self._watch(each)
        except OSError:
            self._close()
            return
        if not self.reading and not any(self.pending.values()):
            self._close()

    def _read(self, sock: socket.socket) -> None:
        data = sock.recv(_CHUNK)
        target = self.other[sock]
        if data:
            self.pending[target] += data
            self._write(target)
        else:
            self.reading.discard(sock)
            self._finish(target)

    def _write(self, sock: socket.socket) -> None:
        if self.pending[sock]:
            try:
                sent = sock.send(self.pending[sock])
            except BlockingIOError:
                return
            self.pending[sock] = self.pending[sock][sent:]
        self._finish(sock)

    def _finish(self, sock: socket.socket) -> None:
        """The end of what one side says is passed on when all of it has been."""
        if self.other[sock] not in self.reading and not self.pending[sock]:
            sock.shutdown(socket.SHUT_WR)

    def _watch(self, sock: socket.socket) -> None:
        events = 0
        if sock in self.reading and not self.pending[self.other[sock]]:
            events |= selectors.EVENT_READ
        if self.pending[sock]:
            events |= selectors.EVENT_WRITE
        registered = sock in self.selector.get_map()
        if events and registered:
            self.selector.modify(sock, events, self)
        elif events:
            self.selector.register(sock, events, self)
        elif registered:
            self.selector.unregister(sock)

    def _close(self) -> None:
        for sock in self.other:
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(sock)
            sock.close()
