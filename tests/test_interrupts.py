"""Ctrl-C, `-x`, `pytest.exit` and timeouts, wherever a test is: the run stops as it does without
containers, and nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

import pytest

from tests.audit import Snapshot
from tests.test_teardown import Waiting, waiting

__all__ = ["waiting"]  # a fixture

BEGIN = """
import os, signal, time, pytest

def ready():
    if "READY" in os.environ:
        os.write(int(os.environ["READY"]), b"0\\n")

def here(place):
    if os.environ["PLACE"] == place:
        ready()
        if os.environ["END"] == "exit":
            pytest.exit("enough", returncode=9)
        assert os.environ["END"] != "fail", "enough"
        time.sleep(1000)

@pytest.fixture(scope="module")
def wide(nsbox_session):
    with nsbox_session.container(memory="64M") as container:
        container.popen("setsid sleep 1000 & sleep 1000", shell=True)
        yield container

@pytest.fixture
def torn_down(tmp_path_factory):
    path = tmp_path_factory.mktemp("notes")
    yield
    (path / "torn-down").touch()

@pytest.fixture
def narrow(torn_down):
    here("set-up")
    yield
    here("teardown")
"""

BESIDE = """
@pytest.fixture
def own(nsbox_container):
    nsbox_container.write_text("/etc/written", "x")
    nsbox_container.publish(80)
    nsbox_container.popen("setsid sleep 1000 & sleep 1000", shell=True)
    return nsbox_container

def test_it(wide, own, narrow):
    here("body")
    if os.environ["PLACE"] == "run":
        ready()
        own.run(["sleep", "1000"])
"""

INSIDE = """
@pytest.mark.sandbox(memory="64M")
def test_it(narrow):
    assert os.getpid() < 10  # a body that ran outside would leave what it starts
    os.system("setsid sleep 1000 >/dev/null 2>&1 &")
    here("body")
"""

LATE = """
@pytest.fixture(scope="module")
def late(tmp_path_factory):
    path = tmp_path_factory.mktemp("late")
    yield
    time.sleep(1.5)  # longer than the parent waits before it interrupts the body itself
    (path / "torn-down").touch()

"""

ASK = """
    request.getfixturevalue("late")
"""

NEXT = """
def test_next(wide, nsbox_container):
    nsbox_container.run(["true"], check=True)
"""

BUILDING = """
def stop(session):
    os.environ["STOPPED"] = str(session._launcher.pid)
    os.kill(session._launcher.pid, signal.SIGSTOP)
    ready()

def test_it(wide, nsbox_session):
    container = nsbox_session.container()
    stop(nsbox_session)
    {}
"""

PLACES = [
    *(("beside", place) for place in ("set-up", "body", "run", "teardown")),
    *(("inside", place) for place in ("set-up", "body", "teardown")),
]
SOURCES = {"beside": BEGIN + BESIDE + NEXT, "inside": BEGIN + INSIDE + NEXT}
everywhere = pytest.mark.parametrize(("kind", "place"), PLACES)

Run = Callable[..., pytest.RunResult]


@pytest.mark.parametrize("who", ["terminal", "pytest"])
@everywhere
def test_ctrl_c(
    kind: str,
    place: str,
    who: str,
    pytester: pytest.Pytester,
    waiting: Callable[[str], Waiting],
    nothing_left: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A terminal sends it to every process of the foreground job, `kill -INT` to pytest alone."""
    monkeypatch.setenv("PLACE", place)
    monkeypatch.setenv("END", "wait")
    run = waiting(SOURCES[kind])
    (os.killpg if who == "terminal" else os.kill)(run.process.pid, signal.SIGINT)
    status, output = run.end()
    assert status == pytest.ExitCode.INTERRUPTED, output
    assert "KeyboardInterrupt" in output
    assert ("1 passed" in output) == (place == "teardown"), output
    assert (pytester.path / "tmp/notes0/torn-down").exists()
    assert "not taken down" not in output


@pytest.mark.parametrize("marker", ["", "@pytest.mark.sandbox\n"], ids=["plain", "inside"])
def test_ctrl_c_in_a_finalizer_leaves_the_others_to_run(
    marker: str,
    pytester: pytest.Pytester,
    waiting: Callable[[str], Waiting],
    nothing_left: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the module's fixtures, and of the test's that end with a wider one."""
    monkeypatch.setenv("PLACE", "teardown")
    monkeypatch.setenv("END", "wait")
    run = waiting(BEGIN + LATE + f"{marker}def test_it(narrow, request):" + ASK)
    os.killpg(run.process.pid, signal.SIGINT)
    status, output = run.end()
    assert status == pytest.ExitCode.INTERRUPTED, output
    for name in ("late", "notes"):
        assert (pytester.path / f"tmp/{name}0/torn-down").exists(), output


@pytest.mark.parametrize("step", ["nsbox_session.container()", "container.close()"])
def test_ctrl_c_while_the_launcher_is_at_work(
    step: str,
    pytester: pytest.Pytester,
    waiting: Callable[[str], Waiting],
    nothing_left: Snapshot,
) -> None:
    """The test never learns of the container that it has asked for."""
    pytester.makeconftest(
        """
        import os, signal
        def pytest_keyboard_interrupt():
            os.kill(int(os.environ["STOPPED"]), signal.SIGCONT)
        """
    )
    run = waiting(BEGIN + BUILDING.format(step) + NEXT)
    os.kill(run.process.pid, signal.SIGINT)
    status, output = run.end()
    assert status == pytest.ExitCode.INTERRUPTED, output
    assert "not taken down" not in output


@pytest.mark.parametrize("option", ["-x", "--maxfail=1"])
@everywhere
def test_the_first_failure_ends_the_run(
    kind: str,
    place: str,
    option: str,
    run_pytest: Run,
    nothing_left: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLACE", place)
    monkeypatch.setenv("END", "fail")
    source = SOURCES[kind].replace('["sleep", "1000"]', '["false"], check=True')
    result = run_pytest(source, option)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    counts = result.parseoutcomes()
    assert (
        counts
        == {
            "set-up": {"errors": 1},
            "body": {"failed": 1},
            "run": {"failed": 1},
            "teardown": {"passed": 1, "errors": 1},
        }[place]
    )


@pytest.mark.parametrize(("kind", "place"), [row for row in PLACES if row[1] != "run"])
def test_pytest_exit(
    kind: str,
    place: str,
    run_pytest: Run,
    nothing_left: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLACE", place)
    monkeypatch.setenv("END", "exit")
    result = run_pytest(SOURCES[kind])
    assert result.ret == 9
    assert result.parseoutcomes() == ({"passed": 1} if place == "teardown" else {})
    result.stdout.fnmatch_lines(["*Exit: enough*"])


@everywhere
def test_a_timeout_by_signal_fails_the_test_and_the_next_one_runs(
    kind: str,
    place: str,
    run_pytest: Run,
    nothing_left: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLACE", place)
    monkeypatch.setenv("END", "wait")
    result = run_pytest(
        SOURCES[kind], "-p", "pytest_timeout", "--timeout=2", "--timeout-method=signal"
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert (
        result.parseoutcomes()
        == {
            "set-up": {"errors": 1, "passed": 1},
            "body": {"failed": 1, "passed": 1},
            "run": {"failed": 1, "passed": 1},
            "teardown": {"passed": 2, "errors": 1},
        }[place]
    )
    result.stdout.fnmatch_lines(["*Timeout*2*s*"])


def _ended_by_a_thread(
    run_pytest: Run, monkeypatch: pytest.MonkeyPatch, place: str, source: str
) -> pytest.RunResult:
    monkeypatch.setenv("PLACE", place)
    monkeypatch.setenv("END", "wait")
    result = run_pytest(
        SOURCES[source], "-p", "pytest_timeout", "--timeout=2", "--timeout-method=thread"
    )
    assert result.ret == 1
    assert re.search(r"\++ Timeout \++", result.stdout.str() + result.stderr.str())
    return result


@pytest.mark.parametrize("place", [place for kind, place in PLACES if kind == "inside"])
def test_a_timeout_by_thread_ends_a_body_inside(
    place: str, run_pytest: Run, nothing_left: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body leaves by os._exit, and the run goes on."""
    result = _ended_by_a_thread(run_pytest, monkeypatch, place, "inside")
    result.stdout.fnmatch_lines(["*the test ended its process with status 1*"])


@pytest.mark.parametrize("place", [place for kind, place in PLACES if kind != "inside"])
def test_a_timeout_by_thread_ends_the_run(
    place: str,
    run_pytest: Run,
    nothing_left: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It leaves by os._exit: no finalizer runs."""
    result = _ended_by_a_thread(run_pytest, monkeypatch, place, "beside")
    assert "passed" not in result.stdout.str()
