"""Other containers started from what one has written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Container, ContainerDied, RootfsError, Session, UnsupportedError
from tests.test_changes import image as image  # a fixture
from tests.test_changes import listed, shell

Make = Callable[..., Container]


def prepare(container: Container) -> None:
    """A little of everything that a writable layer can hold."""
    container.run(
        """
        set -e
        mkdir -p /opt/app/sub /nsbox-top /var/nsbox-var; echo var >/var/nsbox-var/file
        echo one >/opt/app/file; echo top >/nsbox-top/file
        ln /opt/app/file /opt/app/hard; ln -s file /opt/app/soft; mkfifo /opt/app/fifo
        chmod 4711 /opt/app/file; chown 12:34 /opt/app/sub; chmod 750 /opt
        echo user >>/etc/passwd; rm /etc/group
        rm -r /etc/default; mkdir /etc/default; echo new >/etc/default/own
        echo kept >/tmp/note; mkdir /run/service
        truncate -s 64M /opt/app/holes
        """,
        shell=True,
        check=True,
    )


SEEN = """
cd /opt/app; cat file; stat -c '%n %a %u:%g %h' file sub . ..; readlink soft; test -p fifo
tail -1 /etc/passwd; test -e /etc/group || echo no group; ls /etc/default
cat /tmp/note /nsbox-top/file /var/nsbox-var/file; test -d /run/service && echo service
stat -c %s holes
"""


def seen(container: Container) -> str:
    return str(container.run(SEEN, shell=True, check=True).stdout)


@pytest.mark.parametrize("spec", [{}, {"userns": True}, {"memory": "256M"}], ids=str)
def test_a_container_starts_from_the_state_of_another(
    nsbox_container_factory: Make, spec: dict[str, Any]
) -> None:
    assert os.path.isdir("/etc/default")
    first = nsbox_container_factory("first", **spec)
    prepare(first)
    before = seen(first)
    assert "file 4711 0:0 2\nsub 755 12:34" in before
    assert "no group\nown\nkept\ntop\nvar\nservice\n" in before
    rootfs = first.snapshot()
    first.run("rm -r /opt/app /nsbox-top; echo later >/opt/later", shell=True, check=True)
    second = nsbox_container_factory("second", rootfs=rootfs, **spec)
    assert seen(second) == before
    assert not second.run(["ls", "/opt"]).stdout.count("later")
    assert second.read_text("/etc/hostname") == "second\n"
    assert listed(second) == {}
    # what is written upon it is not seen by the next one, nor does it reach the snapshot
    second.run("rm -r /opt/app; rm /tmp/note; echo x >/nsbox-top/more", shell=True, check=True)
    assert listed(second) == {
        "/nsbox-top/more": "added",
        "/opt/app": "deleted",
        "/tmp/note": "deleted",
    }
    third = nsbox_container_factory("third", rootfs=rootfs, **spec)
    assert seen(third) == before


@pytest.mark.parametrize("spec", [{}, {"userns": True}], ids=str)
def test_a_snapshot_of_a_snapshot(nsbox_container_factory: Make, spec: dict[str, Any]) -> None:
    first = nsbox_container_factory(**spec)
    prepare(first)
    second = nsbox_container_factory(rootfs=first.snapshot(), **spec)
    second.run(
        "rm /opt/app/fifo /tmp/note; echo two >/opt/app/two; echo x >/etc/group;"
        "echo more >>/nsbox-top/file; rm -r /opt/app/sub; mkdir /opt/app/sub",
        shell=True,
        check=True,
    )
    third = nsbox_container_factory(rootfs=second.snapshot(), **spec)
    assert third.read_text("/nsbox-top/file") == "top\nmore\n"
    assert third.read_text("/etc/group") == "x\n"
    names = third.run(["ls", "/opt/app"]).stdout.split()
    assert names == "file hard holes soft sub two".split()
    assert third.run(["test", "-e", "/tmp/note"]).returncode
    assert listed(third) == {}


def test_links_between_the_hosts_directories_are_kept_as_they_were_left(
    nsbox_container_factory: Make,
) -> None:
    """In a user namespace the top of the host's root is no overlay."""
    assert os.path.islink("/sbin")
    assert os.path.islink("/lib64")
    first = nsbox_container_factory(userns=True)
    first.run("rm /sbin; ln -s nowhere /nsbox-link; ln -sfn usr/../usr/lib64 /lib64", shell=True)
    second = nsbox_container_factory(userns=True, rootfs=first.snapshot())
    script = (
        "import os; print(os.path.lexists('/sbin'), *map(os.readlink, ['/nsbox-link', '/lib64']))"
    )
    assert second.run(["python3", "-c", script]).stdout == "False nowhere usr/../usr/lib64\n"
    assert listed(first) == {"/sbin": "deleted", "/nsbox-link": "added", "/lib64": "changed"}
    assert listed(second) == {}


def test_attributes_are_kept(nsbox_container_factory: Make) -> None:
    first = nsbox_container_factory(memory="128M")
    first.write_text("/opt/file", "x")
    first.call(lambda: os.setxattr("/opt/file", "user.nsbox", b"value"))
    second = nsbox_container_factory(rootfs=first.snapshot())
    assert second.call(lambda: os.getxattr("/opt/file", "user.nsbox")) == b"value"


def test_an_image_can_be_built_upon(nsbox_container_factory: Make, image: Path) -> None:
    first = nsbox_container_factory(rootfs=image)
    shell(first, "rm -r /data/old; mkdir /data/old; echo x >/data/old/new; rm /data/gone")
    shell(first, "echo x >/tmp/note")
    rootfs = first.snapshot()
    assert rootfs.layers == (str(image),)
    for spec in ({}, {"userns": True}, {"memory": "64M"}):
        second = nsbox_container_factory(rootfs=rootfs, **spec)
        shell(second, "test $(ls /data/old) = new; test ! -e /data/gone; cat /data/keep /tmp/note")
        assert listed(second) == {}
    assert (image / "data/gone").exists()


def test_a_read_only_container_from_a_snapshot_writes_to_tmp_and_run_only(
    nsbox_container_factory: Make,
) -> None:
    first = nsbox_container_factory()
    prepare(first)
    second = nsbox_container_factory(rootfs=first.snapshot(), read_only=True)
    assert second.read_text("/tmp/note") == "kept\n"
    second.write_text("/tmp/note", "x")
    second.write_text("/run/note", "x")
    with pytest.raises(OSError, match="Read-only"):
        second.write_text("/opt/app/file", "x")


def test_a_python_function_runs_in_a_container_from_a_snapshot(
    nsbox_container_factory: Make,
) -> None:
    first = nsbox_container_factory()
    first.write_text("/opt/value", "42")
    second = nsbox_container_factory(rootfs=first.snapshot())
    assert second.call(lambda: int(Path("/opt/value").read_text())) == 42


def test_what_is_shown_of_the_host_below_tmp_is_kept_too(
    nsbox_session: Session, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("host")
    with nsbox_session.container(visible=[str(tmp_path)]) as first:
        first.write_text(tmp_path / "file", "changed")
        rootfs = first.snapshot()
    for visible in ([str(tmp_path)], []):
        with nsbox_session.container(rootfs=rootfs, visible=visible) as second:
            assert second.read_text(tmp_path / "file") == "changed"


WRITER = """
import itertools, os
fds = [os.open(f"/opt/f{i}", os.O_RDWR | os.O_CREAT) for i in range(300)]
for n in itertools.count():
    for fd in fds:
        os.pwrite(fd, b"%9d" % n, 0)
    if n == 1:
        print("up", flush=True)
"""


def test_processes_stand_still_for_it_and_go_on(nsbox_container_factory: Make) -> None:
    """All files have one number at any moment, or this and the next one."""
    first = nsbox_container_factory()
    writer = first.popen(["python3", "-c", WRITER])
    first.wait_for_log("up", process=writer)
    second = nsbox_container_factory(rootfs=first.snapshot())
    numbers = {int(second.read_text(f"/opt/f{i}")) for i in range(300)}
    assert max(numbers) - min(numbers) <= 1
    value = first.read_text("/opt/f0")
    first.wait_until(lambda: first.read_text("/opt/f0") != value, process=writer)
    first.pause()
    assert first.snapshot().source == f"snapshot of {first.name}"
    # it was paused before, so it still is: nobody answers
    with pytest.raises(TimeoutError):
        first.request_init({"op": "socket", "family": 2, "type": 1}, timeout=0.3)
    first.unpause()
    first.run(["true"], check=True)


def test_a_killed_container_can_be_frozen_but_not_one_that_is_gone(
    nsbox_session: Session,
) -> None:
    with nsbox_session.container() as first:
        first.write_text("/opt/file", "x")
        first.kill()
        rootfs = first.snapshot()
    with nsbox_session.container(rootfs=rootfs) as second:
        assert second.read_text("/opt/file") == "x"
    with pytest.raises(ContainerDied):
        first.snapshot()


def test_a_snapshot_of_the_hosts_root_is_for_containers_like_its_own(
    nsbox_container_factory: Make,
) -> None:
    for one, other in (({}, {"userns": True}), ({"userns": True}, {})):
        first = nsbox_container_factory(**one)
        first.write_text("/opt/file", "x")
        with pytest.raises(UnsupportedError, match="userns=True"):
            nsbox_container_factory(rootfs=first.snapshot(), **other)


def files_of(cache: Path) -> list[Path]:
    return list((cache / "writable").glob("*-snapshot*"))


def test_it_goes_with_its_session(tmp_path: Path) -> None:
    with Session(cache=tmp_path, uplink="none") as session, session.container() as container:
        container.write_text("/opt/file", "x")
        rootfs = container.snapshot()
        assert files_of(tmp_path)
    assert not files_of(tmp_path)
    with Session(cache=tmp_path, uplink="none") as session:
        with pytest.raises(RootfsError, match="lives as long as the session"):
            session.container(rootfs=rootfs)


KILLED = """
import os, signal, sys
from pytest_nsbox import Session
session = Session(cache=sys.argv[1], uplink="none").__enter__()
container = session.container()
container.write_text("/opt/file", "x")
container.snapshot()
if sys.argv[2] == "both":
    os.kill(session._launcher.pid, signal.SIGKILL)
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("who", ["pytest", "both"])
def test_it_goes_also_when_all_is_killed(nsbox_session: Session, tmp_path: Path, who: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), who]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "ready\n"), done.stderr
    if who == "both":
        assert files_of(tmp_path)
        with Session(cache=tmp_path, uplink="none") as session:
            session.describe()
    with nsbox_session.container() as container:  # something to wait with
        container.wait_until(lambda: not files_of(tmp_path))
