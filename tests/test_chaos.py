"""A few kills of each kind; `python -m tests.chaos` tries them by the thousand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def chaos(*options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--faults=0", "--containers=0", *options],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_left_by_kills_at_random_moments() -> None:
    status, output = chaos("--kills=30")
    assert status == 0, output
    assert re.search(r"^all +30 ", output, re.MULTILINE), output


def test_leaks_on_purpose_are_found() -> None:
    plants = ("--plant=cgroup", "--plant=layer", "--plant=process")
    status, output = chaos("--kills=1", *plants)
    assert status == 1, output
    assert "LEFT by SIGKILL pytest" in output
    for line in (r"cgroups: \+ .*/nsbox-", r"files: \+ .*-planted$", r"processes: \+ .*sleep 1000"):
        assert re.search(rf"^  {line}", output, re.MULTILINE), output
