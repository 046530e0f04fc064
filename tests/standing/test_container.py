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


def test_a_containers_root_cgroup_is_left_as_it_was(place: Path) -> None:
    """Its processes, the test run among them, have to be moved to a cgroup below, and are moved
    back by the last session that ends."""
    script = """
        import os, subprocess, sys
        from pathlib import Path
        from pytest_nsbox import Session

        root = Path("/sys/fs/cgroup")
        def state():
            own = Path("/proc/self/cgroup").read_text().strip()
            below = sorted(path.name for path in root.iterdir() if path.is_dir())
            return own, below, (root / "cgroup.subtree_control").read_text().strip()

        before = state()
        assert before == ("0::/", [], ""), before
        with Session() as one, one.container(memory="64M", pids=10):
            assert state()[0] == "0::/nsbox-main"
            with Session() as two, two.container(memory="64M"):
                pass
            assert "nsbox-main" in state()[1]
            assert one.describe().startswith("root; cgroup v2: cpu")
        assert state() == before, state()
        print("as it was")
    """
    (place / "it.py").write_text(textwrap.dedent(script))
    os.chdir(place)
    engine = Engine(PRIVILEGED, masked=False, cgroups="own rw")
    done: subprocess.CompletedProcess[str] = engine.run(place, sys.executable, "it.py")
    assert done.stdout == "as it was\n", done.stdout + done.stderr
