"""The way of an init, gone a few times by the process that they are forked from.

The first times that a process comes by, the interpreter looks up each name and fits code to the
types that it meets (PEP 659), and writes both down. In an init each of these is a page of memory
that is no longer shared with all the others, and a fault; before the fork it is for all of them.
"""

from __future__ import annotations

import os
import signal
import socket
import struct

from pytest_nsbox import wire
from pytest_nsbox.init import setup
from pytest_nsbox.init.confine import Confinement
from pytest_nsbox.init.serve import serve
from pytest_nsbox.kernel import libc, sysctl

_ROUNDS = 12  # code is fitted after eight
_NO_REQUEST = struct.pack("=IHHII", 16, 1, 0, 0, 0)  # NLMSG_NOOP (netlink(7))
_NOTHING: wire.Message = {
    "op": "exec",
    "args": [f"{os.devnull}/none"],
    "env": {"PATH": os.defpath},
    "cwd": "/",
    "user": None,
}


def rehearse() -> None:
    """Do it, with nothing asked of the kernel that would make this process another. It is in the
    root directory then, and SIGCHLD is for the caller to set right."""
    kind = setup.Kind(
        network=False, uptime=None, own_userns=False, in_userns=False, capabilities=()
    )
    vars(kind)["confinement"] = confinement = Confinement(frozenset(), bytes(8))
    confinement.prepare()
    with libc.rehearsal():
        for _ in range(_ROUNDS):
            _be_init(kind)
    signal.set_wakeup_fd(-1)


def _be_init(kind: setup.Kind) -> None:
    (launcher, init), (session, inside), (answers, answer) = wire.pair(), wire.pair(), wire.pair()
    with launcher, init, session, inside, answers, answer:
        setup.isolate(kind, init)
        sysctl.write_directly(os.devnull, "0")
        _be_connected(launcher, init)
        setup.join([os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)])
        setup.confine(kind, None)
        wire.send_bytes(init, setup.READY)
        for _ in range(2):
            _, fds = wire.receive_bytes(launcher) or (b"", [])
            wire.close_all(fds)
        wire.send(launcher, _NOTHING, [answer.fileno(), *[inside.fileno()] * 3])
        launcher.shutdown(socket.SHUT_WR)
        serve(init, inside)


def _be_connected(launcher: socket.socket, init: socket.socket) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    wire.send_bytes(launcher, setup.BATCH + _NO_REQUEST, [nowhere])
    wire.send_bytes(launcher, setup.BATCH + _NO_REQUEST)
    wire.send(launcher, {}, [nowhere])
    opened: list[int] = []
    _, fds = setup.connect(init, opened) or (b"", [])
    wire.close_all([*opened, *fds, nowhere])
