"""Every step fails once: what is said, what is left, and what the session can still do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Container, Session, SetupError, TeardownError, UnsupportedError
from tests import faulty
from tests.audit import Snapshot

ERRORS = (errno.ENOSPC, errno.EPERM, errno.EIO)
SPEC: dict[str, Any] = {"memory": "64M", "pids": 20, "cpus": 1}


class Faults:
    """A session whose steps fail as told."""

    def __init__(self, session: Session, path: Path) -> None:
        self.session = session
        self.shared = faulty.plan(str(path))

    def arm(self, who: int, k: int, number: int) -> None:
        faulty.LAYOUT.pack_into(self.shared, 0, who, k, number, 0, 0)

    def disarm(self) -> bool:
        """Whether the step has come, and failed."""
        failed = bool(faulty.LAYOUT.unpack_from(self.shared)[4])
        faulty.LAYOUT.pack_into(self.shared, 0, 0, 0, 0, 0, 0)
        return failed

    def descriptors(self) -> int:
        assert self.session._launcher is not None
        return len(os.listdir(f"/proc/{self.session._launcher.pid}/fd"))


@pytest.fixture
def faults(
    nothing_left: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Faults]:
    monkeypatch.setenv(faulty.FILE, str(tmp_path / "faults"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    start = subprocess.Popen.__init__

    def start_faulty(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        if "pytest_nsbox.launcher" in args:
            options_of_it = args[args.index("pytest_nsbox.launcher") + 1 :]
            args = [sys.executable, "-P", "-m", "tests.faulty", *options_of_it]
        start(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", start_faulty)
    with Session() as session:
        session.container(**SPEC).close()  # what is made once has been made
        yield Faults(session, tmp_path / "faults")
        with session.container(**SPEC) as usable:
            usable.run(["true"], check=True)


def build(faults: Faults) -> tuple[str | None, bool]:
    """Build a container: what the error says, if there is one, and whether a step has failed."""
    try:
        container = faults.session.container(**SPEC)
    except (SetupError, UnsupportedError) as error:
        return str(error), faults.disarm()
    failed = faults.disarm()
    container.close()
    return None, failed


def close(container: Container) -> str | None:
    try:
        container.close()
    except TeardownError as error:
        return str(error)
    return None


@pytest.mark.parametrize("who", [faulty.LAUNCHER, faulty.INIT], ids=["launcher", "init"])
def test_a_step_of_building_that_fails_is_named_and_undone(faults: Faults, who: int) -> None:
    descriptors = faults.descriptors()
    k = failures = 0
    failed = True
    while failed:
        k += 1
        faults.arm(who, k, ERRORS[k % len(ERRORS)])
        said, failed = build(faults)
        if said is not None:
            assert os.strerror(ERRORS[k % len(ERRORS)]) in said
            failures += 1
        with faults.session.container(**SPEC) as usable:
            assert usable.ip == "172.27.0.2"
        assert faults.descriptors() <= descriptors + 1  # an answer may be on its way
    assert failures >= {faulty.LAUNCHER: 8, faulty.INIT: 40}[who], (failures, k)


def test_a_step_of_taking_down_that_fails_is_named_and_the_others_are_taken(
    faults: Faults,
) -> None:
    descriptors = faults.descriptors()
    k, failed = 0, True
    while failed:
        k += 1
        container = faults.session.container(**SPEC)
        faults.arm(faulty.LAUNCHER, k, errno.EIO)
        said = close(container)
        failed = faults.disarm()
        assert said is None or (failed and "Input/output error" in said)
        with faults.session.container(**SPEC) as usable:
            assert usable.ip == "172.27.0.2"
        assert faults.descriptors() <= descriptors + 1  # an answer may be on its way
    assert k >= 3
