"""The command `nsbox`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.audit import Snapshot
from tests.images import Images


def nsbox(*arguments: str, input: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pytest_nsbox.cli import main; raise SystemExit(main())"]
    return subprocess.run(
        [*command, *arguments],
        input=input,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


def test_run_passes_input_output_and_status_on(nothing_left: Snapshot) -> None:
    script = "read line; echo $line from $(hostname); echo problem >&2; exit 7"
    done = nsbox("run", "--hostname=box", "--", "sh", "-c", script, input="hello\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello from box\n", "problem\n")


def test_run_keeps_limits_and_says_when_memory_has_run_out() -> None:
    hog = "x = bytearray(200 << 20)"
    done = nsbox("run", "--memory=64M", "--", "python3", "-c", hog)
    assert done.returncode == 137
    assert "out of memory: limit 64 MiB" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "--memory=64X", "--", "true"], 125, "memory='64X': a size is bytes"),
        (["run", "--rootfs=/no/such.tar", "--", "true"], 125, "/no/such.tar"),
        (["run", "--", "no-such-program"], 127, "no-such-program"),
        (["run"], 125, "no command given"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    arguments: list[str], status: int, message: str
) -> None:
    done = nsbox(*arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stderr.startswith("nsbox: ")
    assert len(done.stderr.splitlines()) == 1


def test_gc_removes_what_a_killed_session_has_left(nothing_left: Snapshot) -> None:
    script = """
        import os, signal, pytest_nsbox
        session = pytest_nsbox.Session()
        session.container(memory="64M")
        os.kill(session._launcher.pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    source = "\n".join(line[8:] for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", source])
    assert done.returncode == -signal.SIGKILL
    removed = nsbox("gc").stdout
    assert "removed cgroup /sys/fs/cgroup" in removed
    assert "removed layer " in removed
    assert nsbox("gc").stdout == ""


def test_the_cache_is_listed_and_pruned(images: Images, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert nsbox("run", f"--rootfs={images.tarball}", "--", "true", **cache).returncode == 0
    (line,) = nsbox("cache", "list", **cache).stdout.splitlines()
    assert str(images.tarball) in line
    assert nsbox("cache", "prune", "--unused-for=1d", **cache).stdout == ""
    assert nsbox("cache", "prune", **cache).stdout == f"removed {line.split()[0]}\n"
    assert nsbox("cache", "list", **cache).stdout == ""
