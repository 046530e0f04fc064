"""What `nsbox gc --check` sees, and whose it says that it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_nsbox import Session, TeardownError
from pytest_nsbox.wire import MARK
from tests.audit import Snapshot, take
from tests.test_cli import nsbox

KILLED = """
import os, signal, pytest_nsbox
session = pytest_nsbox.Session()
session.container(memory="64M")
print(session._launcher.pid, flush=True)
os.kill(session._launcher.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def check_of(launcher: int) -> tuple[int, list[str]]:
    """The exit status of `nsbox gc --check`, and what it says of one session: another, dead one
    may have left something on this machine before."""
    check = nsbox("gc", "--check")
    lines = check.stdout.splitlines()
    assert check.returncode == any(line.startswith("left: ") for line in lines)
    return check.returncode, [line for line in lines if f"(session {launcher}, " in line]


def test_what_a_killed_session_has_left_is_listed_until_it_is_removed(
    nothing_left: Snapshot,
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    launcher = int(done.stdout)
    status, lines = check_of(launcher)
    assert status == 1
    for kind in ("cgroup /sys/fs/cgroup", "layer /", "ledger /"):
        assert any(line.startswith(f"left: {kind}") for line in lines), (kind, lines)
    nsbox("gc")
    assert check_of(launcher)[1] == []


def test_what_a_living_session_owns_is_told_apart() -> None:
    with Session() as session, session.container(memory="64M") as container:
        launcher = session._launcher
        assert launcher is not None
        _, lines = check_of(launcher.pid)
        kinds = {line.split()[2] for line in lines}
        assert kinds >= {"process", "cgroup", "layer", "ledger", "link", "nft"}
        assert all(line.startswith("in use: ") for line in lines)
        assert any(f"process {container.pid} nsbox-init" in line for line in lines)
    assert check_of(launcher.pid)[1] == []


def test_a_process_without_its_launcher_is_listed() -> None:
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, MARK: "dead"}) as orphan:
        try:
            check = nsbox("gc", "--check")
        finally:
            orphan.kill()
    assert check.returncode == 1
    assert f"left: process {orphan.pid} sleep" in check.stdout


LEAVING = """
import os, pytest

@pytest.fixture(scope="session")
def end(nsbox_session):
    nsbox_session.describe()
    yield
    os.kill(nsbox_session._launcher.pid, 9)

def test_it(end): pass
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 0), (["--nsbox-strict"], 1), (["-p", "xdist", "-n1", "--nsbox-strict"], 1)],
    ids=["default", "strict", "strict under xdist"],
)
def test_what_is_not_taken_down_is_named_and_fails_a_strict_run(
    arguments: list[str], status: int, run_pytest: Callable[..., pytest.RunResult]
) -> None:
    result = run_pytest(LEAVING, *arguments)
    assert result.ret == status
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*nsbox: not taken down*", "*the launcher ended with status -9*"])


def test_a_session_looks_for_what_is_its_own_at_its_end() -> None:
    session = Session()
    session.describe()
    assert session._launcher is not None
    environment = Path(f"/proc/{session._launcher.pid}/environ").read_text().split("\0")
    (mark,) = (line.partition("=")[2] for line in environment if line.startswith(MARK + "="))
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, MARK: mark}) as stray:
        try:
            with pytest.raises(TeardownError, match=f"left behind: process {stray.pid} sleep"):
                session.close()
        finally:
            stray.kill()


def added(make: str, undo: str) -> list[str]:
    """What the auditor sees of what a command makes, and nothing of it afterwards."""
    before = take()
    subprocess.run(make, shell=True, check=True)
    found = before.added_in(take())
    subprocess.run(undo, shell=True, check=True)
    before.must_equal_soon()
    return found


@pytest.mark.parametrize(
    ("make", "undo", "seen"),
    [
        (
            "touch /run/left; unshare --net=/run/left true",
            "umount /run/left; rm /run/left",
            r"mounts: \+ .* net:\[\d+\] /run/left ",
        ),
        (
            "ip link add left type bridge && ip address add 192.0.2.9/32 dev left",
            "ip link del left",
            r"addresses: \+ \d+ 192\.0\.2\.9/32",
        ),
        ("nft add table ip left", "nft delete table ip left", r"rules: \+ table ip left"),
        (
            "echo 1 > /proc/sys/net/ipv4/conf/lo/forwarding",
            "echo 0 > /proc/sys/net/ipv4/conf/lo/forwarding",
            r"sysctls: \+ .*conf/lo/forwarding 1",
        ),
        ("mkdir /run/nsbox/left", "rmdir /run/nsbox/left", r"files: \+ /run/nsbox/left"),
    ],
)
def test_the_auditor_of_these_tests_sees(
    make: str, undo: str, seen: str, nothing_left: Snapshot
) -> None:
    assert any(re.match(seen, line) for line in added(make, undo))


def test_it_sees_what_is_in_other_namespaces_and_in_its_own_process() -> None:
    before = take()
    command = "ip link add inner type bridge; mount -t tmpfs inner /mnt; echo made; exec cat"
    with subprocess.Popen(
        ["unshare", "-n", "-m", "sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"made\n"
        found = "\n".join(before.added_in(take()))
        other.stdin.close()  # type: ignore[union-attr]
    for line in (
        r"links: \+ \d+ inner .* in net:\[\d+\]",
        r"mounts: \+ .* /mnt .* in mnt:\[\d+\]",
        rf"processes: \+ {other.pid} .*\(child of {os.getpid()} ",
        r"descriptors: \+ \d+ pipe:",
        r"namespaces: \+ net:",
    ):
        assert re.search(line, found), (line, found)
    before.must_equal_soon()
