"""What all inits do is gone through before they are forked."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from pytest_nsbox import Session

_REHEARSE = """
import os
from pathlib import Path
from pytest_nsbox.init.rehearsal import rehearse

KEPT = ("Name", "Umask", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")

def state():
    lines = Path("/proc/self/status").read_text().splitlines()
    ns = "/proc/self/ns"
    namespaces = [os.readlink(f"{ns}/{kind}") for kind in sorted(os.listdir(ns))]
    kept = [line for line in lines if line.partition(":")[0] in KEPT]
    return kept, namespaces, os.getsid(0), Path("/proc/self/mountinfo").read_text()

before = state()
rehearse()
assert state() == before
os.execv("/bin/echo", ["echo", "the same"])
"""


def test_a_rehearsal_makes_the_process_no_other() -> None:
    done = subprocess.run(
        [sys.executable, "-Werror", "-c", _REHEARSE], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("the same\n", "")


def _own(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_an_init_shares_most_of_its_memory() -> None:
    with Session(pool=0) as session, ExitStack() as stack:
        containers = [stack.enter_context(session.container()) for _ in range(4)]
        assert _own(containers[1].pid) < 1000  # kB; it was more when each learned for itself
