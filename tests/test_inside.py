"""A test whose body runs inside has the outcome, the output and the traceback it has outside."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]


def test_the_body_runs_in_a_container_of_its_own(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import os, socket, pytest

        @pytest.mark.sandbox(cpus=1)
        @pytest.mark.parametrize("n", [1, 2])
        def test_it(n):
            assert socket.gethostname() == "nsbox1"
            assert os.getppid() == 0
            assert open("/proc/1/comm").read() == "nsbox-init\\n"
            assert not os.path.exists("/etc/written")
            open("/etc/written", "w").close()
        """
    )
    result.assert_outcomes(passed=2)
    assert not os.path.exists("/etc/written")


def test_a_test_that_takes_the_fixture_stays_outside(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import os, socket, pytest

        @pytest.fixture
        def through_another(nsbox_container):
            return nsbox_container

        @pytest.mark.sandbox(hostname="marked")
        def test_direct(nsbox_container):
            assert socket.gethostname() != "marked" == nsbox_container.hostname

        @pytest.mark.sandbox(hostname="marked")
        def test_through_another(through_another):
            assert socket.gethostname() != "marked" == through_another.hostname
        """
    )
    result.assert_outcomes(passed=2)


SUITE = """
import os, sys, warnings, pytest

@pytest.fixture(scope="module")
def module_value():
    print("module set up")
    yield 41
    print("module torn down")

@pytest.fixture
def value(module_value):
    print("function set up")
    yield module_value + 1
    print("function torn down")

def test_passes(value):
    print("in the body")
    assert value == 42

def test_fails(value):
    print("to stdout")
    print("to stderr", file=sys.stderr)
    helper(value)

def helper(value):
    assert value == {"not": "this"}

def test_skips(value):
    pytest.skip("no reason")

@pytest.mark.xfail(strict=True)
def test_fails_as_expected():
    assert 0

@pytest.mark.xfail(strict=True)
def test_passes_unexpectedly():
    pass

@pytest.fixture
def broken():
    raise OSError("the fixture is broken")

def test_error_in_set_up(broken):
    pass

@pytest.fixture
def broken_at_the_end():
    yield
    raise OSError("the end is broken")

def test_error_in_teardown(broken_at_the_end):
    pass

@pytest.fixture(scope="module")
def broken_module():
    raise OSError("the module is broken")

def test_error_in_module_set_up(broken_module):
    pass

def test_group():
    raise ExceptionGroup("two", [ValueError(1), TypeError(2)])

def test_capture(capsys, caplog, monkeypatch, recwarn):
    import logging
    print("captured")
    logging.getLogger().warning("logged")
    warnings.warn("warned")
    monkeypatch.setenv("A", "b")
    assert capsys.readouterr().out == "captured\\n"
    assert caplog.messages == ["logged"]
    assert len(recwarn) == 1

class TestClass:
    @pytest.fixture(autouse=True)
    def prepared(self):
        self.ready = True

    def test_method(self):
        assert self.ready
"""


def normal(output: str) -> str:
    """What a run prints, without what may differ between any two runs."""
    lines = [
        line
        for line in output.splitlines()
        if not line.startswith(("nsbox: ", "rootdir", "plugins")) and "passed" not in line
    ]
    text = re.sub(r"\d+\.\d+s", "TIME", "\n".join(lines))
    return re.sub(r"0x[0-9a-f]+", "ADDRESS", text)


@pytest.mark.parametrize("options", [["-rA"], ["-v", "--tb=short"], ["--tb=line"], ["-s"]])
def test_a_suite_prints_the_same_inside_and_outside(run_pytest: Run, options: list[str]) -> None:
    outside = run_pytest(SUITE, *options)
    inside = run_pytest(SUITE, "--nsbox-all", *options)
    assert "tests inside containers" in inside.stdout.str()
    outcomes = outside.parseoutcomes()
    assert outcomes == inside.parseoutcomes()
    assert outcomes == {"failed": 3, "passed": 4, "skipped": 1, "xfailed": 1, "errors": 3}
    assert normal(inside.stdout.str()) == normal(outside.stdout.str())
    assert inside.ret == outside.ret


def test_fixtures_of_a_wider_scope_live_outside_and_once(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import os, pytest
        PID = os.getpid()
        made = []

        @pytest.fixture(scope="module")
        def module_pid():
            made.append(1)
            return os.getpid()

        @pytest.fixture
        def function_pid():
            return os.getpid()

        @pytest.mark.sandbox
        @pytest.mark.parametrize("n", range(3))
        def test_it(n, module_pid, function_pid):
            assert module_pid == PID
            assert function_pid == os.getpid() != PID
            assert made == [1]
        """
    )
    result.assert_outcomes(passed=3)


def test_tmp_path_survives_and_all_else_vanishes(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    result = run_pytest(
        """
        import pathlib, pytest

        @pytest.mark.sandbox
        def test_it(tmp_path):
            (tmp_path / "kept").write_text("yes")
            pathlib.Path("vanishes").write_text("no")
            pathlib.Path("/tmp/vanishes").write_text("no")
        """,
        f"--basetemp={pytester.path}/base",
    )
    result.assert_outcomes(passed=1)
    assert (pytester.path / "base/test_it0/kept").read_text() == "yes"
    assert not (pytester.path / "vanishes").exists()


def test_temporary_files_of_wider_fixtures_are_seen_and_what_becomes_of_them_inside_is_not(
    run_pytest: Run,
) -> None:
    result = run_pytest(
        """
        import pathlib, pytest, tempfile

        @pytest.fixture(scope="module")
        def certificate():
            with tempfile.TemporaryDirectory() as directory:
                path = pathlib.Path(directory, "certificate")
                path.write_text("made once")
                yield path
                assert path.read_text() == "made once"
                assert [*path.parent.iterdir()] == [path]

        @pytest.mark.sandbox
        @pytest.mark.parametrize("number", range(2))
        def test_it(certificate, number):
            assert certificate.read_text() == "made once"
            certificate.write_text("changed inside")
            certificate.with_name("of the body").touch(exist_ok=False)
        """
    )
    result.assert_outcomes(passed=2)


def test_a_body_that_is_killed_fails_with_its_output(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import os, signal, pytest
        pytestmark = pytest.mark.sandbox

        def test_segfault():
            print("last words")
            os.kill(os.getpid(), signal.SIGSEGV)

        def test_exit():
            os._exit(7)

        def test_after():
            pass
        """,
        "-p",
        "no:faulthandler",
    )
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(
        ["*was killed by SIGSEGV*", "*last words*", "*with status 7, without a report*"]
    )


def test_a_failing_body_ends_though_a_watchdog_is_set(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.sandbox
        def test_it(): assert 0

        def test_after(): pass
        """,
        "-o",
        "faulthandler_timeout=60",
    )
    result.assert_outcomes(failed=1, passed=1)


def test_the_watchdog_sees_a_body_that_takes_too_long(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import time, pytest

        @pytest.mark.sandbox(timeout=2)
        def test_it():
            time.sleep(1000)
        """,
        "-o",
        "faulthandler_timeout=0.5",
    )
    result.assert_outcomes(failed=1)
    assert "in test_it" in result.stderr.str()


def test_the_environment_of_the_marker_is_the_bodys(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import os, pytest

        @pytest.mark.sandbox(env={"A": "b"})
        def test_inside():
            assert os.environ["A"] == "b"

        def test_after():
            assert "A" not in os.environ

        @pytest.mark.sandbox(user="nobody")
        def test_user(): pass
        """
    )
    result.assert_outcomes(passed=2, errors=1)
    assert "a body runs inside as who runs pytest" in result.stdout.str()


def test_markers_on_module_class_and_function_merge(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest
        pytestmark = pytest.mark.sandbox(memory="256M", hostname="module")

        @pytest.mark.sandbox(hostname="class", pids=50)
        class TestIt:
            @pytest.mark.sandbox(hostname="function")
            def test_nearest(self, nsbox_container):
                spec = nsbox_container.spec
                assert (spec.hostname, spec.pids, spec.memory) == ("function", 50, 256 << 20)

            def test_next(self, nsbox_container):
                assert nsbox_container.spec.hostname == "class"

        def test_last(nsbox_container):
            assert nsbox_container.spec.hostname == "module"
        """
    )
    result.assert_outcomes(passed=3)


def test_options_come_from_line_environment_and_ini_in_this_order(
    run_pytest: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
        def test_it(nsbox_container):
            print("it is", nsbox_container.spec.network)
    """
    assert "it is nat" in run_pytest(source, "-s").stdout.str()
    pytester.makeini("[pytest]\nnsbox_network = none")
    assert "it is none" in run_pytest(source, "-s").stdout.str()
    monkeypatch.setenv("PYTEST_NSBOX_NETWORK", "isolated")
    assert "it is isolated" in run_pytest(source, "-s").stdout.str()
    assert "it is host" in run_pytest(source, "-s", "--nsbox-network=host").stdout.str()


def test_nsbox_spec_gives_defaults_to_a_directory(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import socket, pytest

        def test_beside(nsbox_container):
            assert nsbox_container.hostname == "from-conftest"

        @pytest.mark.sandbox
        def test_inside():
            assert socket.gethostname() == "from-conftest"

        @pytest.mark.sandbox(hostname="from-marker")
        def test_marker_wins():
            assert socket.gethostname() == "from-marker"
        """,
        conftest="""
        import pytest

        @pytest.fixture
        def nsbox_spec():
            return {"hostname": "from-conftest"}
        """,
    )
    result.assert_outcomes(passed=3)


def test_hooks_are_called(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import socket, pytest

        @pytest.mark.sandbox
        def test_inside():
            assert socket.gethostname() == "from-the-hook"

        def test_beside(nsbox_container):
            assert nsbox_container.rootfs.source == "host"
        """,
        "-s",
        conftest="""
        from pytest_nsbox import Rootfs

        def pytest_nsbox_configure_spec(item, spec):
            return spec.replace(hostname="from-the-hook", rootfs="my:image")

        def pytest_nsbox_resolve_rootfs(source):
            if source == "my:image":
                return Rootfs(source="host", layers=())

        def pytest_nsbox_container_started(container, item):
            print("started for", item.name)

        def pytest_nsbox_container_stopping(container, item):
            print("stopping for", item.name)
        """,
    )
    result.assert_outcomes(passed=2)
    for name in ("test_inside", "test_beside"):
        result.stdout.fnmatch_lines([f"*started for {name}*", f"*stopping for {name}*"])


def test_the_session_works_for_wider_fixtures(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.fixture(scope="module")
        def server(nsbox_session):
            with nsbox_session.container("server", memory="64M") as container:
                yield container

        def test_one(server):
            server.write_text("/etc/state", "kept")

        def test_two(server):
            assert server.read_text("/etc/state") == "kept"
        """
    )
    result.assert_outcomes(passed=2)


def test_the_report_shows_what_the_containers_did(run_pytest: Run) -> None:
    result = run_pytest(
        """
        def test_it(nsbox_container_factory):
            web = nsbox_container_factory("web")
            web.popen("echo cannot read the configuration >&2; exit 4", shell=True).wait(10)
            assert 0
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*nsbox web*", "*status 4*", "*cannot read the configuration*"], consecutive=False
    )


def test_it_works_under_xdist(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.sandbox
        @pytest.mark.parametrize("n", range(4))
        def test_inside(n): pass

        @pytest.mark.parametrize("n", range(4))
        def test_beside(n, nsbox_container):
            assert nsbox_container.ip == "172.27.0.2"
        """,
        "-p",
        "xdist",
        "-n2",
    )
    result.assert_outcomes(passed=8)
