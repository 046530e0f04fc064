"""Processes that end with their parent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import os, select, sys
from pytest_nsbox.kernel import processes

told, tell = os.pipe()
with processes.own_pidfd() as parent:
    if not os.fork():
        os.close(tell)
        if not os.read(told, 1):
            select.select([parent], [], [])  # until the parent has ended
        processes.die_with(parent)
        print("alive")
        os._exit(0)
os.close(told)
if "stay" in sys.argv:
    os.write(tell, b"x")
    print("child:", os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(("how", "said"), [("go", ""), ("stay", "alive\nchild: 0\n")])
def test_a_child_whose_parent_has_ended_before_it_asked_ends_too(how: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, how], capture_output=True, text=True, cwd=os.getcwd()
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
