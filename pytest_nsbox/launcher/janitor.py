"""The process that takes apart what a container leaves, while the launcher has better to do: the
mounts of its namespace, which the kernel takes more than a millisecond to undo, then its writable
layer on the disk."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

from pytest_nsbox import wire
from pytest_nsbox.errors import TeardownError
from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.processes import close_all_but
from pytest_nsbox.launcher import ledger


class Janitor:
    """The launcher's handle on it."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._socket = sock

    @classmethod
    def start(cls) -> Janitor:
        """Fork it off the calling process."""
        ours, theirs = wire.pair()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _work(theirs)
            finally:
                os._exit(status)
        theirs.close()
        return cls(pid, ours)

    def let_go(self, namespace: int) -> None:
        """Have the last descriptor of a mount namespace closed: with it go its mounts. That is the
        janitor's, who keeps it until the next message, only when there is none here any more."""
        with contextlib.suppress(OSError):  # somebody has killed it
            wire.send(self._socket, {}, [namespace])
        os.close(namespace)
        with contextlib.suppress(OSError):
            wire.send(self._socket, {})

    def remove(self, layer: str, ledger_file: Path) -> None:
        """Remove a layer, then strike it from the ledger."""
        try:
            wire.send(self._socket, {"layer": layer, "ledger": str(ledger_file)})
        except OSError:  # somebody has killed it
            ledger.remove_layer(layer)
            ledger.strike(ledger_file, ledger.LAYER, layer)

    def close(self) -> None:
        """Wait until all is gone. Raises TeardownError when something could not be removed."""
        self._socket.close()
        _, status = os.waitpid(self._pid, 0)
        if status and os.WIFEXITED(status):  # killed, it has left its work to who reads the ledger
            raise TeardownError("a writable layer could not be removed")


def _work(launcher: socket.socket) -> int:
    """Until the launcher closes its end, or dies: what it has handed over is removed even then."""
    libc.set_process_name("nsbox-janitor")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    close_all_but([launcher.fileno()])
    status = 0
    namespaces: list[int] = []
    while (received := wire.receive(launcher)) is not None:
        wire.close_all(namespaces)
        message, namespaces = received
        if "layer" not in message:
            continue
        layer = message["layer"]
        try:
            ledger.remove_layer(layer)
            with contextlib.suppress(OSError):  # a row too many does no harm
                ledger.strike(Path(message["ledger"]), ledger.LAYER, layer)
        except OSError as error:
            print(f"rm -r {layer}: {error}", file=sys.stderr, flush=True)
            status = 1
    return status
