"""The process that removes writable layers from the disk, while the launcher has better to do."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from pytest_nsbox.errors import TeardownError
from pytest_nsbox.kernel import libc
from pytest_nsbox.kernel.processes import close_all_but
from pytest_nsbox.launcher import ledger


class Janitor:
    """The launcher's handle on it."""

    def __init__(self, pid: int, pipe: int) -> None:
        self._pid = pid
        self._pipe = pipe

    @classmethod
    def start(cls) -> Janitor:
        """Fork it off the calling process."""
        read, write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _work(read)
            finally:
                os._exit(status)
        os.close(read)
        return cls(pid, write)

    def remove(self, layer: str, ledger_file: Path) -> None:
        """Remove a layer, then strike it from the ledger."""
        try:
            os.write(self._pipe, f"{layer}\0{ledger_file}\n".encode())
        except BrokenPipeError:  # somebody has killed it
            ledger.remove_layer(layer)
            ledger.strike(ledger_file, ledger.LAYER, layer)

    def close(self) -> None:
        """Wait until all is removed. Raises TeardownError when something could not be."""
        os.close(self._pipe)
        _, status = os.waitpid(self._pid, 0)
        if status and os.WIFEXITED(status):  # killed, it has left its work to who reads the ledger
            raise TeardownError("a writable layer could not be removed")


def _work(pipe: int) -> int:
    """Until the launcher closes its end, or dies: what it has handed over is removed even then."""
    libc.set_process_name("nsbox-janitor")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    close_all_but([pipe])
    status = 0
    with open(pipe, encoding="utf-8") as lines:
        for line in lines:
            layer, _, ledger_file = line.rstrip("\n").partition("\0")
            try:
                ledger.remove_layer(layer)
                with contextlib.suppress(OSError):  # a row too many does no harm
                    ledger.strike(Path(ledger_file), ledger.LAYER, layer)
            except OSError as error:
                print(f"rm -r {layer}: {error}", file=sys.stderr, flush=True)
                status = 1
    return status
