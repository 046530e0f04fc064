"""A user whom systemd has logged in, on cgroup v2: run in a machine of that kind, by ci/v2."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pytest_nsbox import Container, Session


def own_cgroup() -> str:
    return Path("/proc/self/cgroup").read_text().strip()


def test_the_run_is_in_a_scope_of_the_users_own(nsbox_session: Session) -> None:
    assert "cgroup v2: cpu memory" in nsbox_session.describe()
    assert "/user@1500.service/" in own_cgroup()
    assert re.search(r"/nsbox-\d+\.scope(/nsbox-main)?$", own_cgroup())


@pytest.mark.sandbox(memory="64M", cpus=1, pids=50)
def test_the_limits_of_a_body_inside_are_kept() -> None:
    group = Path("/sys/fs/cgroup")
    assert (group / "memory.max").read_text() == f"{64 << 20}\n"
    assert (group / "pids.max").read_text() == "50\n"
    assert str(os.getpid()) in (group / "cgroup.procs").read_text().split()


@pytest.mark.sandbox(memory="64M")
def test_over_memory_the_container_is_killed(nsbox_container: Container) -> None:
    assert nsbox_container.run(["python3", "-c", "x = bytearray(200 << 20)"]).oom_killed


def test_a_controller_that_is_not_delegated_is_refused_with_the_cure(
    nsbox_session: Session,
) -> None:
    with (
        pytest.raises(Exception, match=r"cpuset controller .* is not handed down.*Delegate=yes"),
        nsbox_session.container(cpuset="0"),
    ):
        pass


def test_a_second_session_finds_the_scope(nsbox_container: Container) -> None:
    before = own_cgroup()
    assert before.endswith(".scope/nsbox-main")
    with Session() as other, other.container(pids=10) as container:
        assert container.stats().pids == 1
    assert own_cgroup() == before
