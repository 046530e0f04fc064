"""The messages between the test process, the launcher and init.

A message is one JSON object in one packet of a SOCK_SEQPACKET socket, with file descriptors beside
it (unix(7), SCM_RIGHTS). A large one travels in a memfd whose descriptor comes first. A request
carries the descriptor that its answer comes back on, so that threads and forked children can
share a socket without a lock, and the end of file on it says that nobody will answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from _socket import socket as Socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pytest_nsbox import errors

Message = dict[str, Any]

ENDED = "the other side has ended"
"""How the error ends that says that nobody answers: no one's answer does."""

MARK = "NSBOX_SESSION"
"""The environment variable by which the processes of a session are known. None of a container's
commands has it: they die with their PID 1, which has."""

_PACKET = 32 << 10
_LARGEST = 16 << 20
_MOST_FDS = 253  # SCM_MAX_FD: with more, sending fails (EINVAL)
_IN_MEMFD = b"*"
# plain numbers: an operation on the enumerations that socket has them in takes longer than a call
NOSIGNAL, _CLOEXEC = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC)
_CUT = int(socket.MSG_CTRUNC | socket.MSG_TRUNC)
RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))
_INT = struct.calcsize("i")
_ROOM = socket.CMSG_LEN(_MOST_FDS * _INT)
ONE_PACKET = (_PACKET, _ROOM, _CLOEXEC)
"""The arguments of `socket.recvmsg` for a message."""
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: Socket, message: Message, fds: Iterable[int] = ()) -> None:
    """Send one message. Raises OSError (EPIPE when the other end is gone)."""
    payload = encode(message)
    if len(payload) <= _PACKET:
        send_bytes(sock, payload, fds)
        return
    memfd = os.memfd_create("nsbox-message", os.MFD_CLOEXEC)
    try:
        os.writev(memfd, [payload])
        send_bytes(sock, _IN_MEMFD, [memfd, *fds])
    finally:
        os.close(memfd)


def encode(message: Message) -> bytes:
    """A message as it is sent."""
    return _encode(message).encode()


def decode(payload: bytes) -> Message:
    """A message that has been received. Raises ValueError for what is none."""
    try:
        text = payload.decode()
        message, end = _decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a message: {error}") from None
    if not isinstance(message, dict) or end < len(text):
        raise ValueError("not a message: it is not one object")
    return message


def send_bytes(sock: Socket, payload: bytes, fds: Iterable[int] = ()) -> None:
    """Send one that has been encoded and is small."""
    numbers = tuple(fds)
    beside = struct.pack(f"{len(numbers)}i", *numbers)
    sock.sendmsg([payload], [(*RIGHTS, beside)] if numbers else [], NOSIGNAL)


def receive(sock: Socket, *, flags: int = 0) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors (close-on-exec), or None at the end of file.

    Raises ValueError for what is no message: the other end is not to be trusted with more.
    """
    received = receive_bytes(sock, flags=flags)
    if received is None:
        return None
    payload, fds = received
    try:
        return decode(payload), fds
    except ValueError:
        close_all(fds)
        raise


def receive_bytes(sock: Socket, *, flags: int = 0) -> tuple[bytes, list[int]] | None:
    """The same, not decoded."""
    # not recv_fds, which does not pass the flags on (up to Python 3.14 at least)
    try:
        payload, beside, found, _ = sock.recvmsg(_PACKET, _ROOM, flags | _CLOEXEC)
    except ConnectionResetError:
        # that the other end is gone and has not read all of ours comes first, and once; then what
        # it has said
        payload, beside, found, _ = sock.recvmsg(_PACKET, _ROOM, flags | _CLOEXEC)
    return unpack(payload, beside, found)


def unpack(
    payload: bytes, beside: list[tuple[int, int, bytes]], found: int
) -> tuple[bytes, list[int]] | None:
    """The same, of what `socket.recvmsg` has returned."""
    fds: list[int] = []
    for level, kind, data in beside:
        if (level, kind) == RIGHTS:
            fds += struct.unpack_from(f"{len(data) // _INT}i", data)
    if not payload:
        return None
    try:
        if found & _CUT:
            raise ValueError("some of its descriptors or bytes had no room; raise ulimit -n")
        if payload == _IN_MEMFD:
            payload = _take_memfd(fds.pop(0))
    except (ValueError, IndexError, OSError) as error:
        close_all(fds)
        raise ValueError(f"not a message: {error}") from None
    return payload, fds


def _take_memfd(fd: int) -> bytes:
    try:
        size = os.fstat(fd).st_size
        if size > _LARGEST:
            raise ValueError(f"a message of {size} bytes")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def is_ready(fd: int, seconds: float | None, event: int = select.POLLIN) -> bool:
    """Wait for poll(2)'s `event`, at most so long, or with None until it comes; select(2) takes
    no descriptor above 1,023."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            continue


def request(
    sock: socket.socket, message: Message, fds: Sequence[int] = ()
) -> tuple[Message, list[int]]:
    """Ask and wait for the one answer.

    Raises the NsboxError that the other side answers with, ContainerDied when it is gone.
    """
    with ask(sock, message, fds) as answer:
        return reply_of(answer)


@contextlib.contextmanager
def ask(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> Iterator[socket.socket]:
    """Send a request; gives the socket that its answers will come on."""
    with post(sock, message, fds) as answer:
        yield answer


def post(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> socket.socket:
    """The same, for who closes that socket. Raises ContainerDied when the other side is gone."""
    mine, theirs = pair()
    with theirs:
        try:
            send(sock, message, [theirs.fileno(), *fds])
        except BaseException as error:
            mine.close()
            if isinstance(error, (BrokenPipeError, ConnectionResetError)):
                raise errors.ContainerDied(f"cannot {message.get('op')}: {ENDED}") from None
            raise
    return mine


def reply_of(answer: socket.socket) -> tuple[Message, list[int]]:
    """The next answer on a request's socket, its error raised."""
    received = receive(answer)
    if received is None:
        raise errors.ContainerDied(ENDED)
    message, fds = received
    try:
        raise_error(message)
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def raise_error(message: Message) -> None:
    """Raise what an answer says has gone wrong, if it does: an NsboxError or an OSError."""
    if "oserror" in message:
        number, text, filename = message["oserror"]
        raise OSError(number, text, filename)
    if "error" in message:
        raise load_error(message["error"])


def dump_oserror(error: OSError) -> Message:
    """The answer that makes the other side raise the same OSError."""
    return {"oserror": [error.errno, error.strerror or str(error), error.filename]}


def dump_failure(error: Exception) -> Message:
    """The answer to a request that has failed: an OSError as the same, all else as ours."""
    if isinstance(error, OSError):
        return dump_oserror(error)
    return {"error": dump_error(error)}


def dump_error(error: BaseException) -> Message:
    """An error as plain data."""
    name = type(error).__name__ if type(error).__name__ in errors.BY_NAME else "SetupError"
    data: Message = {"type": name, "text": str(error)}
    if isinstance(error, OSError):
        data["text"] = str(error) if error.filename or not error.strerror else error.strerror
        data["errno"] = error.errno
    notes = list(getattr(error, "__notes__", ()))
    if notes:
        data["notes"] = notes
    return data


def load_error(data: Any) -> errors.NsboxError:
    """The error that `dump_error` made data of."""
    if not isinstance(data, dict):
        return errors.NsboxError(str(data))
    error = errors.BY_NAME.get(str(data.get("type")), errors.NsboxError)(str(data.get("text")))
    for note in data.get("notes", ()):
        error.add_note(str(note))
    return error
