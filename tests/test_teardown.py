"""Whatever ends a run, the machine is as it was."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_nsbox import Session, wire
from pytest_nsbox.launcher import janitor
from tests.audit import Snapshot, take
from tests.conftest import command_line

BEGIN = """
import os, signal, pytest

@pytest.fixture
def two_busy_containers(nsbox_container_factory, nsbox_network_factory):
    lan = nsbox_network_factory("lan", subnet="10.9.0.0/24", internet=False)
    a = nsbox_container_factory("a", memory="64M", cpus=1, pids=50)
    b = nsbox_container_factory("b", networks=[lan], disk="8M")
    for container in (a, b):
        container.write_text("/etc/written", "x")
        container.popen(["python3", "-m", "http.server", "80"])
        container.popen("setsid sleep 1000 & setsid sleep 1000", shell=True)
        container.wait_for_port(80, process=container.processes[0])
        container.publish(80)
    return a, b
"""

ENDS = {
    "pass": "def test_it(two_busy_containers): pass",
    "fail": "def test_it(two_busy_containers): assert 0",
    "error in set-up": """
@pytest.fixture
def broken(two_busy_containers): raise OSError
def test_it(broken): pass
""",
    "os._exit": "def test_it(two_busy_containers): os._exit(3)",
    "pass inside": "@pytest.mark.sandbox(memory='64M')\ndef test_it(): open('/etc/x', 'w').close()",
    "fail inside": "@pytest.mark.sandbox(memory='64M')\ndef test_it(): assert 0",
    "os._exit inside": "@pytest.mark.sandbox\ndef test_it(): os._exit(3)",
}

STATUS = {"pass": 0, "pass inside": 0, "os._exit": 3}

WAITING = """
def test_it(two_busy_containers):
    pid = two_busy_containers[0].session._launcher.pid
    os.write(int(os.environ["READY"]), b"%d\\n" % pid)
    two_busy_containers[0].run(["sleep", "1000"])
"""

WAITING_INSIDE = """
@pytest.mark.sandbox(memory="64M")
def test_it():
    os.write(int(os.environ["READY"]), b"0\\n")
    os.system("sleep 1000")
"""


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_by_a_run_that_ends_with(
    end: str, run_pytest: Callable[..., pytest.RunResult], nothing_left: Snapshot
) -> None:
    result = run_pytest(BEGIN + ENDS[end])
    assert result.ret == STATUS.get(end, 1)


def test_nothing_is_left_of_a_container_while_its_session_goes_on() -> None:
    """Not even what the end of the session would take along."""

    def come_and_go(session: Session) -> None:
        with session.container(memory="64M", cpus=1, pids=50, cpuset="0") as container:
            container.write_text("/etc/written", "x")
            container.popen("setsid sleep 1000 & setsid sleep 1000", shell=True)
            container.publish(80)

    with Session() as session:
        come_and_go(session)  # makes what belongs to the session
        before = take()
        come_and_go(session)
        before.must_equal_soon()


class Waiting:
    """A run of pytest in the middle of a test."""

    def __init__(self, pytester: pytest.Pytester, source: str) -> None:
        pytester.makepyfile(test_it=BEGIN + source)
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [*command_line(), f"--basetemp={pytester.path}/tmp"],
            env={**os.environ, "READY": str(write)},
            pass_fds=[write],
            cwd=pytester.path,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            # a shell starts what it puts into the background with this signal ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(write)
        with open(read) as ready:
            self.launcher = int(ready.readline())

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@pytest.fixture
def waiting(pytester: pytest.Pytester) -> Iterator[Callable[[str], Waiting]]:
    started = []

    def start(source: str) -> Waiting:
        started.append(Waiting(pytester, source))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize("source", [WAITING, WAITING_INSIDE], ids=["beside", "inside"])
def test_nothing_is_left_by_ctrl_c(
    source: str, waiting: Callable[[str], Waiting], nothing_left: Snapshot
) -> None:
    """A terminal sends it to every process of the foreground job."""
    run = waiting(source)
    os.killpg(run.process.pid, signal.SIGINT)
    status, output = run.end()
    assert status == pytest.ExitCode.INTERRUPTED, output
    assert "KeyboardInterrupt" in output


@pytest.mark.parametrize("source", [WAITING, WAITING_INSIDE], ids=["beside", "inside"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_nothing_is_left_when_pytest_is_killed(
    source: str, number: signal.Signals, waiting: Callable[[str], Waiting], nothing_left: Snapshot
) -> None:
    """pytest runs no finalizer then; the launcher sees its socket close."""
    run = waiting(source)
    run.process.send_signal(number)
    assert run.end()[0] == -number


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM])
def test_a_signal_that_pytest_was_started_without_does_not_matter(
    number: signal.Signals, pytester: pytest.Pytester, nothing_left: Snapshot
) -> None:
    """What is ignored stays ignored by those started later (signal(7)); a parent that ignores
    SIGCHLD is told of no child's end."""
    pytester.makepyfile(
        f"""
        import pytest

        def test_beside(nsbox_container):
            nsbox_container.publish(80)
            done = nsbox_container.run("kill -{number:d} $$; echo still here", shell=True)
            assert done.returncode == {-number if number != signal.SIGCHLD else 0}

        @pytest.mark.sandbox(memory="64M")
        def test_inside(): pass
        """
    )
    done = subprocess.run(
        command_line(),
        cwd=pytester.path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_left_when_the_launcher_is_asked_to_end(
    waiting: Callable[[str], Waiting], nothing_left: Snapshot
) -> None:
    run = waiting(WAITING)
    os.kill(run.launcher, signal.SIGTERM)
    status, _ = run.end()
    assert status != 0


@pytest.mark.parametrize("first", ["pytest", "launcher"])
def test_nothing_is_left_when_pytest_and_launcher_are_killed(
    first: str, waiting: Callable[[str], Waiting], nothing_left: Snapshot
) -> None:
    """The kernel frees what has no name; the next session removes the rest."""
    run = waiting(WAITING)
    both = [run.process.pid, run.launcher]
    for pid in both if first == "pytest" else reversed(both):
        os.kill(pid, signal.SIGKILL)
    assert run.end()[0] == -signal.SIGKILL
    with Session() as session:
        session.describe()


def test_a_sweep_leaves_a_living_session_alone() -> None:
    with Session() as living, living.container(memory="64M") as container:
        with Session() as other:
            other.describe()
        container.run(["true"], check=True)
        assert container.stats().memory_limit == 64 << 20
        container.write_text("/etc/x", "still there")


def test_a_ledger_cut_short_is_read_for_what_it_has(tmp_path: Path) -> None:
    from pytest_nsbox.launcher import ledger

    layer = tmp_path / "layer"
    layer.mkdir()
    (tmp_path / "rows").mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    rows = [
        f'{{"owner": {{"pid": {dead.pid}, "start": 1, "boot": "{ledger.boot_id()}"}}}}',
        f'{{"made": "layer", "value": "{layer}"}}',
        '{"made": "sysctl", "value": ["too", "short"]}',
        '{"made": "layer", "val',
    ]
    (tmp_path / "rows" / "boot-1-1").write_text("\n".join(rows))
    assert ledger.sweep(tmp_path / "rows") == [f"layer {layer}"]
    assert not layer.exists()


def test_what_cannot_be_taken_down_is_raised_first_error_first() -> None:
    """Every step runs, whatever failed before."""
    from pytest_nsbox.errors import TeardownError
    from pytest_nsbox.launcher.undo import Undo

    done = []

    def fails(name: str) -> Callable[[], None]:
        def step() -> None:
            done.append(name)
            raise OSError(16, f"{name} is busy")

        return step

    undo = Undo()
    for name in ("first", "second", "third"):
        undo.push(f"rmdir {name}", fails(name))
    with pytest.raises(TeardownError, match=r"rmdir third: .*third is busy") as caught:
        undo.run()
    assert done == ["third", "second", "first"]
    assert [note.split(":")[0] for note in caught.value.__notes__] == [
        "then rmdir second",
        "then rmdir first",
    ]


def test_the_last_to_close_a_mount_namespace_is_the_janitor() -> None:
    """Whoever is has its mounts to undo. It closes what came with a message at the next one, which
    the launcher sends when it has closed its own."""
    ours, theirs = wire.pair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os._exit(janitor._work(theirs))
    theirs.close()
    (first, first_end), (second, second_end) = os.pipe(), os.pipe()
    for end in (first_end, second_end):
        wire.send(ours, {}, [end])
        os.close(end)
    assert wire.is_ready(first, 10)
    assert not wire.is_ready(second, 0)
    ours.close()
    assert wire.is_ready(second, 10)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(first)
    os.close(second)
