"""Copies bytes between those who connect and a server: what a forwarding process runs.

It is also run by forks of the zygote, so it imports little.
"""

from __future__ import annotations

import contextlib
import ipaddress
import mmap
import selectors
import socket
from collections.abc import Callable

_CHUNK = 1 << 18
Connect = Callable[[], socket.socket | None]  # None: refused


def reach(ip: str, port: int) -> socket.socket | None:
    """A connection to a port, None where there is none."""
    with contextlib.suppress(OSError):
        return socket.create_connection((ip, port), timeout=10)
    return None


def forward_to_loopback(listener: int, port: int, table: int | None, network: str) -> None:
    """Forward to a server on the loopback of the network namespace that the process is in.

    `table` is a file with a byte for every address of `network`: 1 for who may come in.
    """
    welcome: Callable[[str], bool] = bool
    if table is not None:
        allowed = mmap.mmap(table, 0, prot=mmap.PROT_READ)
        first = int(ipaddress.IPv4Network(network).network_address)

        def welcome(ip: str) -> bool:
            number = int(ipaddress.IPv4Address(ip)) - first
            return 0 <= number < len(allowed) and allowed[number] == 1

    # a server bound to "localhost" may listen on either
    Forwarder(listener, lambda: reach("127.0.0.1", port) or reach("::1", port), welcome).run()


class Forwarder:
    """Copies bytes both ways between each accepted connection and one to the server."""

    def __init__(self, listener: int, connect: Connect, welcome: Callable[[str], bool]) -> None:
        self.listener = socket.socket(fileno=listener)
        self.listener.setblocking(False)
        self.connect, self.welcome = connect, welcome
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
            client, peer = self.listener.accept()
        except OSError:
            return
        server = self.connect() if self.welcome(peer[0]) else None
        if server is None:
            # refused there, refused here: a reset, not an empty answer
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _Connection(self.selector, client, server)


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
