"""In a container with a cgroup namespace of its own, on cgroup v2: run as root, by ci/v2."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nested import PRIVILEGED, Engine


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


STATE = """
import os, signal, subprocess, sys
from pathlib import Path
from pytest_nsbox import Session

root = Path("/sys/fs/cgroup")
def state():
    own = Path("/proc/self/cgroup").read_text().strip()
    below = sorted(path.name for path in root.iterdir() if path.is_dir())
    return own, below, (root / "cgroup.subtree_control").read_text().strip()

before = state()
assert before == ("0::/", [], ""), before
"""


def in_a_container(place: Path, script: str) -> str:
    (place / "it.py").write_text(STATE + textwrap.dedent(script))
    os.chdir(place)
    engine = Engine(PRIVILEGED, masked=False, cgroups="own rw")
    done: subprocess.CompletedProcess[str] = engine.run(place, sys.executable, "it.py")
    return done.stdout + done.stderr


def test_a_containers_root_cgroup_is_left_as_it_was(place: Path) -> None:
    """Its processes, the test run among them, have to be moved to a cgroup below, and are moved
    back by the last session that ends."""
    script = """
        with Session() as one, one.container(memory="64M", pids=10):
            assert state()[0] == "0::/nsbox-main"
            with Session() as two, two.container(memory="64M"):
                pass
            assert "nsbox-main" in state()[1]
            assert one.describe().startswith("root; cgroup v2: cpu")
        assert state() == before, state()
        print("as it was")
    """
    assert in_a_container(place, script) == "as it was\n"


def test_it_is_so_again_after_the_next_session_when_all_of_one_was_killed(place: Path) -> None:
    killed = """
        from pytest_nsbox import Session
        Session().__enter__().container(memory="64M")
        print("on", flush=True)
        import signal; signal.pause()
    """
    script = f"""
        child = subprocess.Popen([sys.executable, "-c", {textwrap.dedent(killed)!r}], stdout=-1)
        assert child.stdout.readline() == b"on\\n"
        assert os.getpid() == 1  # of a namespace
        os.kill(-1, signal.SIGKILL)
        try:
            while os.wait():
                pass
        except ChildProcessError:
            pass
        assert len(state()[1]) > 1, state()  # nsbox-main, and what it was for
        with Session() as session, session.container(memory="64M"):
            pass
        assert state() == before, state()
        print("as it was")
    """
    assert in_a_container(place, script) == "as it was\n"
