"""What runs inside and does not want to end: all of it ends within its time, and is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pytest_nsbox import Bind, CallError, Container, Session, TeardownError, wire
from tests import unanswered
from tests.audit import Snapshot
from tests.test_cli import nsbox

# PID 1 is Python, and shares two cores with what is hostile to it
DEADLINE = 15.0 * (4 if os.environ.get("RUN_IN_V2") else 1)

DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"

ORPHAN = """
import os, sys, time
told, tell = os.pipe()
if not os.fork():  # its parent ends, and so does the session that it was in
    os.setsid()
    if not os.fork():
        open("/proc/self/comm", "w").write("grandchild")
        print("up", flush=True)
        os.write(tell, b"up")
        time.sleep(1000)
    os._exit(0)
os.read(told, 2)
"""

BOMB = """
import os
while True:
    try:
        os.fork()
    except BlockingIOError:
        print("full", flush=True)
"""

ZOMBIES = """
import os
for _ in range(4):
    os.fork()
print("up", flush=True)
while True:
    if not os.fork():
        os.fork() or os._exit(0)
        os._exit(0)
    os.wait()
"""

BUSY = """
mkdir /tmp/mine && mount -t tmpfs none /tmp/mine && cd /tmp/mine && mkdir sub
mount --bind sub /etc && exec 9>/etc/file
echo up
while :; do sleep 1000; done
"""


@contextmanager
def deadline(seconds: float = DEADLINE) -> Iterator[None]:
    begin = time.monotonic()
    yield
    took = time.monotonic() - begin
    assert took < seconds, took


def python(container: Container, source: str, up: str = "up") -> subprocess.Popen[str]:
    process = container.popen([sys.executable, "-S", "-c", source])
    container.wait_for_log(up, process=process)
    return process


@pytest.mark.parametrize("source", [ORPHAN, BOMB, ZOMBIES], ids=["orphan", "bomb", "zombies"])
def test_what_is_deaf_to_sigterm_is_killed_and_named(source: str, nothing_left: Snapshot) -> None:
    """A grandchild in a session of its own, a fork bomb, and processes that end as fast as they
    are started."""
    with Session() as session, session.container(pids=60) as container:
        process = python(container, DEAF + source, "full" if source == BOMB else "up")
        with deadline():
            container.stop(timeout=0.5)
        assert "been taken down" in str(container.death())
        name = "grandchild" if source == ORPHAN else re.escape(Path(sys.executable).name[:15])
        said = container.summary().splitlines()[-1]
        assert re.match(rf"SIGTERM has not ended, so SIGKILL has: .*\b\d+ \({name}", said), said
        if source == ORPHAN:
            assert process.wait() == 0
        else:
            assert f"{process.pid} (" in said or " more" in said
        with deadline():
            container.close()


@pytest.mark.parametrize("source", [ORPHAN, BOMB, ZOMBIES], ids=["orphan", "bomb", "zombies"])
def test_they_are_gone_with_their_container(source: str, nothing_left: Snapshot) -> None:
    with Session() as session, session.container(pids=60) as container:
        python(container, DEAF + source, "full" if source == BOMB else "up")
        with deadline():
            container.close()
        with session.container(pids=60) as usable:
            usable.run(["true"], check=True)


def test_a_failing_test_names_what_it_has_left_running(
    run_pytest: Callable[..., pytest.RunResult], nothing_left: Snapshot
) -> None:
    result = run_pytest(
        """
        def test_it(nsbox_container):
            nsbox_container.run("setsid sleep 1234 >/dev/null 2>&1 &", shell=True)
            nsbox_container.popen(["sleep", "1000"])
            assert 0
        """
    )
    result.stdout.re_match_lines([r"'sleep 1000' is running", r"running besides: \d+ \(sleep\)$"])


def test_mounts_that_are_in_use_are_taken_down(nothing_left: Snapshot) -> None:
    """Those made inside go with their mount namespace; one held from outside, when let go."""
    with Session() as session, session.container(privileged=True, memory="64M") as container:
        container.popen(BUSY, shell=True)
        container.wait_for_log("up")
        held = container.open("/etc/file", os.O_RDONLY)
        written = container.open("/root/written", os.O_CREAT | os.O_RDWR)
        os.write(written, b"here")
        with deadline():
            container.close()
        assert os.pread(written, 9, 0) == b"here"
        os.close(written)
        os.close(held)


@pytest.mark.parametrize(
    ("signal", "rest"),
    [("KILL", "sleep 1000"), ("STOP", "sleep 1000"), ("STOP", "exit 3"), ("KILL", "exit 3")],
)
def test_who_kills_or_stops_its_reaper_does_not_outlive_the_timeout(
    signal: str, rest: str, nothing_left: Snapshot
) -> None:
    """`run` with a timeout puts a process between PID 1 and the command, to know its children."""
    with Session() as session, session.container() as container:
        for _ in range(3):
            with deadline():
                with suppress(subprocess.TimeoutExpired):
                    result = container.run(f"kill -{signal} $PPID; {rest}", shell=True, timeout=1)
                    assert (signal, result.returncode) == ("KILL", -9)
            # PID 1, sh, ls; what has been killed is reaped a moment later
            container.wait_until(
                lambda: len(container.run("ls -d /proc/[0-9]*", shell=True).stdout.split()) <= 3
            )


def test_who_kills_all_others_does_not_outlive_the_timeout(nothing_left: Snapshot) -> None:
    """Its own session it has left, so nothing tells PID 1 whose it is: that is said."""
    command = "setsid sh -c 'kill -9 -1; sleep 1000'; sleep 1000"
    with Session() as session, session.container() as container:
        with deadline(), pytest.raises(subprocess.TimeoutExpired) as caught:
            container.run(command, shell=True, timeout=1)
        assert "goes on" in caught.value.__notes__[0]
        assert re.search(r"running besides: \d+ \(sh\), \d+ \(sleep\)", container.summary())


THIEF = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None)
init = os.pidfd_open(1)
print("up", flush=True)
for fd in range(3, 12):
    stolen = libc.syscall(438, init, fd, 0)  # pidfd_getfd
    if stolen < 0 or not os.readlink(f"/proc/self/fd/{stolen}").startswith("socket:"):
        continue
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=stolen)
    if sys.argv[1] == "close":
        sock.shutdown(socket.SHUT_RDWR)
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"{" * 1000)
    except OSError as error:
        print(error, flush=True)
os.system("sleep 1000")
"""


def test_the_sockets_of_pid_1_are_out_of_reach(nothing_left: Snapshot) -> None:
    with Session() as session, session.container() as container:
        result = container.run([sys.executable, "-c", THIEF.replace("os.system", "#"), "close"])
        assert (result.returncode, result.stdout) == (0, "up\n")
        container.run(["true"], check=True)


@pytest.mark.parametrize("how", ["close", "flood"])
def test_where_they_are_in_reach_their_abuse_ends_with_the_container(
    how: str, nothing_left: Snapshot
) -> None:
    """`privileged` lifts what keeps them apart."""
    with Session() as session, session.container(privileged=True) as container:
        container.popen([sys.executable, "-c", THIEF, how])
        with deadline():
            container.stop(timeout=1)
        with deadline():
            container.close()
        with session.container() as usable:
            usable.run(["true"], check=True)


def test_a_body_in_a_paused_container_is_killed_all_the_same(nothing_left: Snapshot) -> None:
    """On version 1 what is frozen does not die."""
    with Session() as session, session.container() as container:
        container.run(["true"])
        container.pause()
        with deadline(), pytest.raises(CallError, match=r"has not ended within 0\.5 s"):
            container.call(time.sleep, 1000, timeout=0.5)
        container.pause()
        with deadline(), pytest.raises(subprocess.TimeoutExpired):
            container.run(["true"], timeout=0.5)
        with deadline():
            container.stop(timeout=0.5)
        with deadline():
            container.close()


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_signal_lets_a_paused_container_go_on(end: str, nothing_left: Snapshot) -> None:
    with Session() as session, session.container() as container:
        process = container.popen(["sleep", "1000"])
        container.pause()
        with deadline():
            getattr(process, end)()
            assert process.wait() == -int(signal.SIGKILL if end == "kill" else signal.SIGTERM)
        container.run(["true"], check=True)
        assert not container.paused


@contextmanager
def stuck(session: Session, count: int, tmp_path: Path) -> Iterator[list[Container]]:
    """Containers with a process each that SIGKILL does not end: the kernel waits for an answer."""
    pidfds: list[int] = []
    try:
        with unanswered.mounted(tmp_path) as waiting:
            containers = []
            for _ in range(count):
                container = session.container(
                    memory="64M", cpus=1, pids=50, mounts=[Bind(tmp_path, "/mnt", read_only=True)]
                )
                containers.append(container)
                container.popen(["cat", f"/mnt/{unanswered.NAME}"])
                assert os.read(waiting, 1)
                children = f"/proc/{container.pid}/task/{container.pid}/children"
                pidfds.append(os.pidfd_open(int(Path(children).read_text())))
            yield containers
    finally:
        for pidfd in pidfds:
            assert wire.is_ready(pidfd, DEADLINE)
            os.close(pidfd)


def test_who_waits_for_a_device_is_named_and_given_up(
    nothing_left: Snapshot, tmp_path: Path
) -> None:
    session = Session()
    session.describe()
    with stuck(session, 1, tmp_path) as (container,):
        for step in (lambda: container.stop(timeout=0.5), container.close):
            with deadline(), pytest.raises(TeardownError, match=r"not end: \d+ \(cat\) in state D"):
                step()
        with session.container() as usable:
            usable.run(["true"], check=True)
        with deadline(), pytest.raises(TeardownError, match="left behind"):
            session.close()
    assert "cgroup" in nsbox("gc").stdout


def test_five_containers_that_do_not_end_are_given_up_together(
    nothing_left: Snapshot, tmp_path: Path
) -> None:
    """And what they have left is swept once they can be."""
    session = Session()
    session.describe()
    with stuck(session, 5, tmp_path) as containers:
        for container in containers:
            for process in container.processes:
                process.abandon()
            container._init.close()
            os.close(container.pidfd)
        with deadline(), pytest.raises(TeardownError) as caught:
            session.close()
        assert str(caught.value).count("(cat) in state D") >= 5
    assert "cgroup" in nsbox("gc").stdout
