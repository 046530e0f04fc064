"""Containers made ahead: as new as any other, and gone with the rest."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Container, Session, SetupError, SpecError, TeardownError
from pytest_nsbox.kernel import processes
from tests.audit import Snapshot

SPEC: dict[str, Any] = {"memory": "64M", "pids": 20}


def inits(session: Session, name: str = "nsbox-init") -> set[int]:
    """The inits of a session: children of its zygote."""
    assert session._launcher is not None
    running = list(processes.all_of_them())
    (zygote,) = (
        p.pid for p in running if p.parent == session._launcher.pid and p.name == "nsbox-zygote"
    )
    return {p.pid for p in running if p.parent == zygote and p.name == name and p.state != "Z"}


def ahead(session: Session, *taken: Container, at_least: int = 1) -> set[int]:
    """Those made ahead, when there are as many; a process that comes to be is no event."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = inits(session) - {container.pid for container in taken}
        if len(found) >= at_least:
            return found
        time.sleep(0.001)
    raise AssertionError(f"none was made ahead within 10 s: {inits(session)}")


@pytest.fixture
def session(nothing_left: Snapshot) -> Iterator[Session]:
    with Session(pool=2) as session:
        yield session


def test_what_was_made_ahead_is_given_out_once_and_is_as_any_other(session: Session) -> None:
    seen = set()
    with session.container(**SPEC) as first:
        seen.add(first.pid)
        waiting = ahead(session, first)
    for _ in range(10):
        with session.container(**SPEC) as container:
            assert container.pid in waiting
            assert container.pid not in seen
            seen.add(container.pid)
            assert (container.name, container.ip) == (first.name, first.ip)
            words = "hostname; cat /etc/hostname; hostname -i; cat /root/mine; echo > /root/mine"
            done = container.run(words, shell=True)
            assert done.stdout == f"{first.name}\n{first.name}\n{first.ip}\n"
            assert container.stats().memory_limit == 64 << 20
            assert f"{first.ip}\t{first.name}" in container.read_text("/etc/hosts")
            waiting = ahead(session, container)


def test_two_made_ahead_have_names_and_addresses_of_their_own(session: Session) -> None:
    with session.container(**SPEC) as a, session.container(**SPEC) as b:
        waiting = ahead(session, a, b, at_least=2)
    with session.container("left", **SPEC) as a, session.container("right", **SPEC) as b:
        assert {a.pid, b.pid} == waiting
        assert b.run(["ping", "-c1", "-W5", "left"]).returncode == 0
        assert a.run(["ping", "-c1", "-W5", "right"]).returncode == 0


@pytest.mark.parametrize(
    "other",
    [
        {"memory": "65M"},
        {"network": "none"},
        {"read_only": True},
        {"privileged": True},
        {"uptime": 5},
        {"capabilities": ["-NET_RAW"]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_kind_is_made_when_it_is_asked_for(session: Session, other: dict[str, Any]) -> None:
    with session.container(**SPEC) as first:
        waiting = ahead(session, first)
    with session.container(**{**SPEC, **other}) as container:
        if other == {"network": "none"}:  # it is the same but for what the network is joined to
            assert container.pid in waiting
            assert container.ip is None
            assert container.run("ls /sys/class/net", shell=True).stdout.split() == ["lo"]
        else:
            assert container.pid not in waiting


def test_as_many_are_made_as_were_had_at_once_and_one_and_no_more_than_the_pool_holds(
    nothing_left: Snapshot,
) -> None:
    with Session(pool=3) as session, session.container(**SPEC) as a:
        assert len(_settled(session, a, at_least=2)) == 2
        with session.container(**SPEC) as b, session.container(**SPEC) as c:
            old = _settled(session, a, b, c, at_least=3)
            assert len(old) == 3
            with session.container(pids=30) as d:
                # the last kind that was asked for has the room of the oldest
                deadline = time.monotonic() + 10
                while len(_settled(session, a, b, c, d) - old) < 2 and time.monotonic() < deadline:
                    pass
                assert len(_settled(session, a, b, c, d) - old) == 2
                assert len(_settled(session, a, b, c, d) & old) == 1


def _settled(session: Session, *taken: Container, at_least: int = 1) -> set[int]:
    """The same when there has been time for more."""
    ahead(session, *taken, at_least=at_least)
    for _ in range(100):
        session.describe()
    return ahead(session, *taken)


def test_one_that_has_died_is_not_given_out(session: Session) -> None:
    with session.container(**SPEC) as first:
        waiting = ahead(session, first, at_least=2)
        for pid in waiting:
            _kill(pid)
    with session.container(**SPEC) as container:
        assert container.pid not in waiting
        container.run(["true"], check=True)


def test_the_next_init_is_forked_ahead_and_may_die(nothing_left: Snapshot) -> None:
    with Session() as session:
        with session.container(**SPEC) as first:
            assert inits(session) == {first.pid}
            (waiting,) = _named(session, "nsbox-ahead")
        with session.container(**SPEC) as second:
            assert second.pid == waiting
            (waiting,) = _named(session, "nsbox-ahead")
            _kill(waiting)
        with session.container(**SPEC) as third:
            assert third.pid != waiting
            third.run(["true"], check=True)


def _kill(pid: int) -> None:
    """And wait for its end."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)


def _named(session: Session, name: str) -> set[int]:
    deadline = time.monotonic() + 10
    while not (found := inits(session, name)) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


def test_a_directory_of_the_host_that_was_replaced_is_seen_anew(
    session: Session, tmp_path: Path
) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    with session.container(**SPEC, visible=[str(shown)]) as first:
        waiting = ahead(session, first)
    shown.rename(tmp_path / "old")
    shown.mkdir()
    (shown / "new").touch()
    with session.container(**SPEC, visible=[str(shown)]) as container:
        assert container.pid not in waiting
        assert container.run(["ls", shown]).stdout == "new\n"


def test_what_the_host_has_written_since_is_seen(session: Session, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("changed", "gone", "sub/gone"):
        (tmp_path / name).write_text("before\n")
    with session.container(**SPEC, visible=[str(tmp_path)]) as first:
        waiting = ahead(session, first)
    for name in ("new", "changed", "sub/new"):
        (tmp_path / name).write_text("since\n")
    (tmp_path / "gone").unlink()
    (tmp_path / "sub/gone").unlink()
    with session.container(**SPEC, visible=[str(tmp_path)]) as container:
        assert container.pid in waiting
        done = container.run("ls -R; cat new changed sub/new", shell=True, cwd=tmp_path)
        assert done.stdout == ".:\nchanged\nnew\nsub\n\n./sub:\nnew\nsince\nsince\nsince\n"


MOUNTS = """
import subprocess, sys
from pytest_nsbox import Session
from tests.test_pool import SPEC, ahead
with Session(pool=1) as session:
    with session.container(**SPEC) as first:
        waiting = ahead(session, first)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[1]], check=True)
        open(sys.argv[1] + "/new", "w").close()
    with session.container(**SPEC) as container:
        assert container.pid not in waiting
        assert container.run(["ls", sys.argv[1]]).stdout == "new\\n"
"""


def test_a_filesystem_mounted_since_is_seen(nothing_left: Snapshot) -> None:
    command = ["unshare", "-m", sys.executable, "-c", MOUNTS, "/srv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


def test_without_waiting_the_address_is_free_at_once_and_the_end_comes(session: Session) -> None:
    seen = []
    for _ in range(12):  # more than may be dying at a time
        container = session.container(**SPEC)
        container.popen("setsid sleep 1000 & setsid sleep 1000", shell=True)
        seen.append(os.pidfd_open(container.pid))
        assert container.ip == "172.27.0.2"
        container.close(wait=False)
        assert not container.stats().oom_kills
    for pidfd in seen:
        select.select([pidfd], [], [])
        os.close(pidfd)


def test_what_goes_wrong_without_waiting_is_raised_at_the_end() -> None:
    session = Session()
    container = session.container(**SPEC)
    with _stranger_in_the_cgroup_of(container.pid) as stranger:
        container.close(wait=False)
        with pytest.raises(TeardownError, match=rf"^rmdir cgroup: .*members: {stranger}"):
            session.close()
    with Session() as sweeping:  # it has not been forgotten
        sweeping.describe()


def test_what_goes_wrong_with_one_that_nobody_had_is_raised_at_the_end(
    nothing_left: Snapshot,
) -> None:
    session = Session(pool=1)
    with session.container(**SPEC) as container:
        (waiting,) = ahead(session, container)
    with _stranger_in_the_cgroup_of(waiting) as stranger:
        with session.container(pids=30) as other:  # of the first kind there is no room for one
            other.run(["true"], check=True)
        with pytest.raises(TeardownError, match=rf"^rmdir cgroup: .*members: {stranger}"):
            session.close()
    with Session() as sweeping:
        sweeping.describe()


def test_what_goes_wrong_with_one_that_cannot_become_what_is_ordered_is_raised_at_the_end(
    nothing_left: Snapshot,
) -> None:
    small: dict[str, Any] = {"disk": "64K", "pids": 20}
    session = Session(pool=1)
    with session.container(**small) as container:
        (waiting,) = ahead(session, container)
    many = {f"a-name-of-many-letters-{n}.example": "198.51.100.1" for n in range(4000)}
    with _stranger_in_the_cgroup_of(waiting) as stranger:
        with pytest.raises(SetupError, match="write /etc/hosts: No space left"):
            session.container(**small, hosts=many)
        with pytest.raises(TeardownError, match=rf"undoing: rmdir cgroup: .*{stranger}"):
            session.close()
    with Session() as sweeping:
        sweeping.describe()


@contextmanager
def _stranger_in_the_cgroup_of(init: int) -> Iterator[int]:
    """A process that is none of the container's, so that the cgroup cannot be removed."""
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.procs").exists()
    deadline = time.monotonic() + 10
    path = ""
    while "nsbox-" not in path and time.monotonic() < deadline:  # it joins while it mounts
        rows = Path(f"/proc/{init}/cgroup").read_text().splitlines()
        (path,) = (row.split(":")[2] for row in rows if ("0::" if v2 else ":pids:") in row)
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        try:
            procs = root / ("" if v2 else "pids") / path.lstrip("/") / "cgroup.procs"
            procs.write_text(str(stranger.pid))
            yield stranger.pid
        finally:
            stranger.kill()


@pytest.mark.parametrize("text", ["x", "-1", "1.5"])
def test_a_pool_that_is_no_number_is_a_usage_error(
    text: str, run_pytest: Callable[..., pytest.RunResult]
) -> None:
    result = run_pytest("def test_it(): pass", f"--nsbox-pool={text}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--nsbox-pool={text}: * a number, 0 or more"])
    with pytest.raises(SpecError, match="pool=-1"):
        Session(pool=-1)


def test_tests_get_what_was_made_ahead(
    run_pytest: Callable[..., pytest.RunResult], nothing_left: Snapshot
) -> None:
    result = run_pytest(
        """
        import pytest
        from tests.test_pool import ahead, inits
        taken = set()

        @pytest.mark.sandbox(pids=20)
        @pytest.mark.parametrize("n", range(5))
        def test_outside(nsbox_container, nsbox_session, n):
            if n:
                assert nsbox_container.pid in taken
            assert nsbox_container.ip == "172.27.0.2"
            taken.clear()
            taken.update(ahead(nsbox_session, nsbox_container))

        @pytest.mark.sandbox(pids=20)
        @pytest.mark.parametrize("n", range(5))
        def test_inside(n):
            import pathlib
            assert not pathlib.Path("/root/mine").exists()
            pathlib.Path("/root/mine").touch()
        """,
        "--nsbox-pool=2",
        f"--rootdir={Path(__file__).parent.parent}",
    )
    result.assert_outcomes(passed=10)


def test_what_it_has_used_up_to_its_end_is_told_after_it(session: Session) -> None:
    container = session.container(**SPEC)
    before = container.stats().cpu
    container.run("i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done", shell=True, check=True)
    container.close(wait=False)
    assert container.stats().cpu > before + 0.01
