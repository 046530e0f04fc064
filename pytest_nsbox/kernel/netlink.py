"""A netlink socket that sends many messages at once and checks every acknowledgement.

pyroute2 knows how messages are laid out; sending them is a plain socket's work. One send for a
whole batch costs a fraction of one exchange per message (netlink(7)).
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import struct
import sys
from _socket import socket as Socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_CREATE = 0x400
NLM_F_EXCL = 0x200
NLM_F_REPLACE = 0x100
NLMSG_ERROR = 2
NLMSG_DONE = 3

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_EXT_ACK = 11

_HEADER = struct.Struct("=IHHII")
# plain numbers, and not socket.socket, which looks them up in enumerations: an init opens one, too
_AF_NETLINK, _KIND = int(socket.AF_NETLINK), int(socket.SOCK_RAW | socket.SOCK_CLOEXEC)


@dataclass(frozen=True)
class Request:
    """One message, ready but for its sequence number, and what it does, for people."""

    what: str
    kind: int
    flags: int
    payload: bytes
    acknowledged: bool = True

    def describe(self) -> str:
        return self.what


@dataclass(frozen=True)
class Batch:
    """Several, as they are sent, and by their sequence numbers those that will be answered."""

    data: bytes
    count: int
    waiting: dict[int, Request]

    @classmethod
    def of(cls, requests: Iterable[Request], last: int = 0) -> Batch:
        """Numbered from the one after `last` on, the last that its socket has sent."""
        numbered = dict(enumerate(requests, last + 1))
        return cls(
            b"".join(_message(request, number) for number, request in numbered.items()),
            len(numbered),
            {number: request for number, request in numbered.items() if request.acknowledged},
        )


def import_only_messages() -> None:
    """Have pyroute2's layouts of messages imported without the rest of it, which the package
    imports, too: asyncio and a database, a tenth of a second of a launcher's start. For a process
    that has no other use for pyroute2."""
    spec = importlib.util.find_spec("pyroute2")
    if spec is not None and "pyroute2" not in sys.modules:
        sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)  # and is not executed


def encode(message: Any) -> bytes:
    """The bytes of a pyroute2 message, without the netlink header."""
    message.reset()
    message.encode()
    return bytes(message.data[_HEADER.size :])


class Template:
    """A message encoded once, in which a few values are then put into place: to lay one out takes
    pyroute2 longer than it takes the kernel to make a link of it."""

    def __init__(self, encoded: bytes, **marks: bytes) -> None:
        """`marks` are the values that stand for those to come, of the same length."""
        self._encoded = encoded
        self._places = {name: encoded.index(mark) for name, mark in marks.items()}
        assert all(encoded.count(mark) == 1 for mark in marks.values())

    def fill(self, **values: bytes) -> bytes:
        message = bytearray(self._encoded)
        for name, value in values.items():
            place = self._places[name]
            message[place : place + len(value)] = value
        return bytes(message)


def open_socket(protocol: int = NETLINK_ROUTE) -> Socket:
    """A netlink socket in the network namespace that the caller is in now."""
    sock = Socket(_AF_NETLINK, _KIND, protocol)
    sock.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
    return sock


class Netlink:
    """A netlink socket in the network namespace that the caller is in now."""

    def __init__(
        self, protocol: int = NETLINK_ROUTE, *, groups: int = 0, timeout: float | None = None
    ) -> None:
        self._socket = open_socket(protocol)
        self._socket.bind((0, groups))
        self._socket.settimeout(timeout)
        self._sequence = 0

    @classmethod
    def adopt(cls, fd: int) -> Netlink:
        """One that another process has made, in the network namespace that it was made in."""
        netlink = cls.__new__(cls)
        netlink._socket = Socket(fileno=fd)
        netlink._sequence = 0
        return netlink

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait(self) -> None:
        """Wait for a notification of the groups joined. Raises TimeoutError."""
        self._socket.recv(1 << 16)

    def send(self, requests: Iterable[Request]) -> None:
        """Carry out `requests` in order with one send. Raises OSError for the first refused."""
        batch = self.batch(requests)
        if batch.data:
            self._socket.send(batch.data)
            self.confirm(batch)

    def batch(self, requests: Iterable[Request]) -> Batch:
        """Requests to be sent on this socket, by this process or another that has it."""
        batch = Batch.of(requests, self._sequence)
        self._sequence += batch.count
        return batch

    def forget(self) -> None:
        """Drop what has not been read: answers to a batch that nobody has confirmed."""
        while True:
            try:
                self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # some have had no room (netlink(7))
                    raise

    def confirm(self, batch: Batch) -> None:
        """When a batch has been sent: read what the kernel has to say to it, which is all there.
        Raises OSError for the first refused."""
        waiting = dict(batch.waiting)
        first: OSError | None = None
        while waiting:
            for kind, sequence, body in _messages(self._socket.recv(1 << 16)):
                request_ = waiting.pop(sequence, None)
                if request_ is None or kind != NLMSG_ERROR:
                    continue
                number = -struct.unpack_from("=i", body)[0]
                if number and first is None:
                    first = _refusal(request_.what, number, body)
        if first is not None:
            raise first

    def get(self, request: Request) -> bytes:
        """The body of the one answer to a get request. Raises OSError when it is refused."""
        self._sequence += 1
        self._socket.send(_message(request, self._sequence))
        while True:
            for kind, sequence, body in _messages(self._socket.recv(1 << 16)):
                if sequence != self._sequence:
                    continue
                if kind == NLMSG_ERROR:
                    raise _refusal(request.what, -struct.unpack_from("=i", body)[0], body)
                return body

    def dump(self, request: Request) -> list[bytes]:
        """The bodies of all answers to a dump request. Raises OSError when it is refused."""
        self._sequence += 1
        self._socket.send(_message(request, self._sequence))
        bodies: list[bytes] = []
        while True:
            for kind, sequence, body in _messages(self._socket.recv(1 << 16)):
                if sequence != self._sequence:
                    continue
                if kind == NLMSG_DONE:
                    return bodies
                if kind == NLMSG_ERROR:
                    raise _refusal(request.what, -struct.unpack_from("=i", body)[0], body)
                bodies.append(body)


def _message(request: Request, sequence: int) -> bytes:
    flags = request.flags | NLM_F_REQUEST | (NLM_F_ACK if request.acknowledged else 0)
    length = _HEADER.size + len(request.payload)
    padding = b"\0" * (-length % 4)
    return _HEADER.pack(length, request.kind, flags, sequence, 0) + request.payload + padding


def _messages(data: bytes) -> Iterable[tuple[int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _flags, sequence, _ = _HEADER.unpack_from(data, offset)
        yield kind, sequence, data[offset + _HEADER.size : offset + length]
        offset += length + -length % 4


def _refusal(what: str, number: int, body: bytes) -> OSError:
    """The error of an NLMSG_ERROR, with the kernel's own words where it sends them."""
    words = ""
    offset = 4 + _HEADER.size  # the errno, then the refused message's header (capped)
    refused = struct.unpack_from("=I", body, 4)[0]
    if len(body) > offset + refused - _HEADER.size:
        offset += refused - _HEADER.size + -refused % 4
    while offset + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, offset)
        if length < 4:
            break
        if kind == 1:  # NLMSGERR_ATTR_MSG
            words = body[offset + 4 : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += length + -length % 4
    reason = os.strerror(number) + (f" ({words})" if words else "")
    return OSError(number, f"{what}: {reason}")


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in what follows the fixed header of a message."""
    found = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += length + -length % 4
    return found
