"""It works wherever, and however, pytest was started."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_nsbox import Container, wire
from tests.conftest import command_line

BOTH = """
import os, pytest

def test_beside(nsbox_container):
    nsbox_container.run(["true"], check=True)

@pytest.mark.sandbox(memory="64M")
def test_inside(tmp_path):
    (tmp_path / "x").write_text("")
"""

Start = Callable[..., None]


@pytest.fixture
def start(pytester: pytest.Pytester) -> Start:
    """Start pytest on a test beside and one inside, in a directory of some kind; both pass."""

    def run(directory: Path, **how: object) -> None:
        (directory / "test_it.py").write_text(BOTH)
        options = {
            "cwd": directory,
            "capture_output": True,
            "text": True,
            "errors": "replace",
            **how,
        }
        done = subprocess.run([*command_line(), directory / "test_it.py"], **options)  # type: ignore[call-overload]
        assert "2 passed" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0

    return run


@pytest.mark.parametrize("parent", ["/tmp", "/run", "/var/tmp", "/dev/shm"])
@pytest.mark.parametrize("name", ["plain", "with space, comma:colon\\backslash", b"not-utf-8-\xff"])
def test_the_project_may_be_anywhere(start: Start, parent: str, name: str | bytes) -> None:
    with _made(os.path.join(parent, "nsbox-project-" + os.fsdecode(name))) as directory:
        start(directory)


class _made:
    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.mkdir()
        return self.path

    def __exit__(self, *exc_info: object) -> None:
        subprocess.run(["rm", "-r", self.path], check=True)


def test_the_project_may_be_seen_through_a_link(start: Start, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    start(tmp_path / "link")


@pytest.mark.parametrize(
    "changed",
    [
        {"HOME": None},
        {"LC_ALL": "C", "LANG": None},
        {"XDG_RUNTIME_DIR": "/no/such/place"},
        {"XDG_CACHE_HOME": None, "HOME": "no-such-home"},
        {"ODD": os.fsdecode(b"\xff\xfe"), "EMPTY": "", "LONG": "x" * 100_000},
        {"PYTHONPATH": ":relative:"},
    ],
    ids=lambda changed: "+".join(changed),
)
def test_the_environment_may_be_odd(
    start: Start, tmp_path: Path, changed: dict[str, str | None]
) -> None:
    changed = {**changed}
    if changed.get("HOME"):
        changed["HOME"] = str(tmp_path / str(changed["HOME"]))
    env = {**os.environ, **{name: value for name, value in changed.items() if value is not None}}
    for name, value in changed.items():
        if value is None:
            env.pop(name, None)
    start(tmp_path, env=env)


def test_few_descriptors_and_a_strict_umask_are_enough(start: Start, tmp_path: Path) -> None:
    def strict() -> None:
        os.umask(0o077)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    start(tmp_path, preexec_fn=strict)


def test_the_directory_may_have_gone(nsbox_container: Container, tmp_path: Path) -> None:
    gone, before = tmp_path / "gone", os.getcwd()
    gone.mkdir()
    os.chdir(gone)
    try:
        gone.rmdir()
        assert nsbox_container.run(["pwd"], check=True).stdout == "/\n"
        assert nsbox_container.call(os.getcwd) == "/"
    finally:
        os.chdir(before)


def test_bytes_that_are_no_text_come_through(nsbox_container: Container) -> None:
    odd = b"\xff\xfe \n'"
    script = b'printf "%s%s" "$1" "$ODD"'
    done = nsbox_container.run(
        [b"sh", b"-c", script, b"sh", odd], env={"ODD": os.fsdecode(odd)}, text=False, check=True
    )
    assert done.stdout == odd * 2
    path = "/tmp/" + os.fsdecode(b"\xff")
    nsbox_container.write_text(path, "x")
    assert nsbox_container.read_text(path) == "x"


def test_a_long_command_comes_through(nsbox_container: Container) -> None:
    done = nsbox_container.run(["printf", "%s\\n", *["x" * 50] * 20_000], check=True)
    assert done.stdout == ("x" * 50 + "\n") * 20_000
    with pytest.raises(OSError, match="Argument list too long"):
        nsbox_container.run(["true", "x" * 200_000])


def test_a_hundred_descriptors_are_passed(nsbox_container: Container) -> None:
    fds = [os.memfd_create(f"number {n}") for n in range(100)]
    try:
        process = nsbox_container.popen(["ls", "-l", "/proc/self/fd"], pass_fds=tuple(fds))
        assert process.wait(10) == 0
        assert process.log().count("/memfd:number") == 100
    finally:
        for fd in fds:
            os.close(fd)


def test_a_message_that_has_lost_its_descriptors_is_none() -> None:
    """The kernel drops those that the receiver has no room for (unix(7), MSG_CTRUNC)."""
    mine, theirs = wire.pair()
    with mine, theirs:
        wire.send(mine, {"op": "x"}, [0] * 5)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, before[1]))
        try:
            with pytest.raises(ValueError, match="descriptors"):
                wire.receive(theirs)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert os.dup(0) == free
        os.close(free)
