"""A machine on which time passes and nothing of ours runs: a freezer, a debugger, a paused VM."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from pytest_nsbox import wire
from pytest_nsbox.launcher import build

SPELL = 0.1


def sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_launcher_that_was_frozen_with_its_init_goes_on_waiting_for_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(SPELL)
    with ours, theirs:
        launcher = os.fork()
        if launcher == 0:
            status = 1
            try:
                received = build._next_word(ours)
                status = 0 if received is not None and received[0] == {"op": "ready"} else 2
            finally:
                os._exit(status)
        pidfd = os.pidfd_open(launcher)
        try:
            while not sleeps(launcher):
                os.sched_yield()
            os.kill(launcher, signal.SIGSTOP)
            time.sleep(2 * build._SPELLS * SPELL)  # all of its patience, and what it cannot use
            os.kill(launcher, signal.SIGCONT)
            assert not wire.is_ready(pidfd, 2 * SPELL)
            wire.send(theirs, {"op": "ready"})
            assert os.waitpid(launcher, 0)[1] == 0
        finally:
            os.close(pidfd)
