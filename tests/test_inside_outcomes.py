"""How a body inside can end, and what pytest says of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pexpect
import pytest

from pytest_nsbox import Session
from tests.test_inside import normal

Run = Callable[..., pytest.RunResult]

SUITE = """
import logging, unittest, warnings, pytest

logger = logging.getLogger("suite")

@pytest.fixture(scope="module")
def wide():
    logger.warning("wide set up")
    print("wide prints")
    yield
    logger.warning("wide torn down")
    print("wide prints again")

@pytest.fixture
def narrow(wide):
    logger.warning("narrow set up")
    yield
    logger.warning("narrow torn down")

def test_logs(narrow):
    logger.error("in the body")
    assert 0

def test_warns():
    warnings.warn("from the body")

def test_subtests(subtests):
    for n in range(3):
        with subtests.test(n=n):
            assert n != 1

def test_system_exit():
    raise SystemExit(3)

@pytest.mark.skipif("1 == 1", reason="a condition")
def test_skipped(wide): pass

@pytest.mark.xfail(raises=ValueError)
def test_fails_in_another_way(): raise TypeError

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.xfail)])
def test_param(n): assert n == 1

class TestUnittest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.made = [0]

    def setUp(self): self.made = [*self.made, 1]
    def test_one(self): self.assertEqual(self.made, [0, 1])
    @unittest.skip("skipped")
    def test_three(self): pass
    @unittest.expectedFailure
    def test_four(self): self.fail()

class TestTwoErrors:
    @pytest.fixture(scope="class")
    def outer(self):
        yield
        raise OSError("outer")

    @pytest.fixture
    def inner(self):
        yield
        raise OSError("inner")

    def test_both(self, inner, outer): pass
"""


@pytest.mark.parametrize(
    "options",
    [
        ["-rA"],
        ["--capture=sys", "-rA"],
        ["--capture=tee-sys"],
        ["-v", "--setup-show"],
        ["--log-cli-level=INFO"],
        ["-x"],
        ["--maxfail=2", "--tb=native"],
    ],
    ids=" ".join,
)
def test_a_suite_prints_the_same_inside_and_outside(run_pytest: Run, options: list[str]) -> None:
    source = SUITE.split("class TestTwoErrors")[0]
    outside = run_pytest(source, *options)
    inside = run_pytest(source, "--nsbox-all", *options)
    assert "tests inside containers" in inside.stdout.str()
    assert normal(inside.stdout.str()) == normal(outside.stdout.str())
    assert inside.parseoutcomes() == outside.parseoutcomes()
    assert inside.ret == outside.ret


def test_errors_of_both_teardowns_are_one_error_and_both_are_shown(run_pytest: Run) -> None:
    result = run_pytest(SUITE, "--nsbox-all", "-k", "test_both")
    result.assert_outcomes(passed=1, errors=1, deselected=11)
    for text in ("OSError: outer", "OSError: inner"):
        assert text in result.stdout.str()


def test_a_crash_is_reported_with_the_dump_of_faulthandler(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import faulthandler, pytest

        def crash():
            faulthandler._sigsegv()

        @pytest.mark.sandbox
        def test_it():
            print("last words")
            crash()

        @pytest.mark.sandbox
        def test_after(): pass
        """
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        ["*killed by SIGSEGV", "Fatal Python error: *", "*in crash", "*last words*"]
    )


def test_exit_ends_the_run_and_tears_down_first(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.fixture
        def narrow():
            yield
            print("narrow torn down")

        @pytest.mark.sandbox
        def test_it(narrow):
            pytest.exit("that is all", returncode=9)

        def test_never(): pass
        """,
        "-s",
    )
    assert result.ret == 9
    result.stdout.fnmatch_lines(["*narrow torn down*", "*no tests ran*", "*Exit: that is all*"])


def test_an_interrupt_names_the_line_of_the_test(run_pytest: Run) -> None:
    result = run_pytest("def test_it():\n    raise KeyboardInterrupt\n", "--nsbox-all")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*test_it.py:2: KeyboardInterrupt"])


def test_a_wider_fixture_asked_for_by_name_inside_ends_inside(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import os, pytest

        @pytest.fixture(scope="session")
        def wide():
            pid = os.getpid()
            yield pid
            assert os.getpid() == pid
            print("torn down in", "the body" if os.getppid() == 0 else "pytest")

        @pytest.mark.sandbox
        @pytest.mark.parametrize("n", range(2))
        def test_it(n, request):
            assert request.getfixturevalue("wide") == os.getpid()
        """,
        "-s",
    )
    result.assert_outcomes(passed=2)
    assert result.stdout.str().count("torn down in the body") == 2


def test_an_attachment_that_cannot_be_pickled_is_left_out(run_pytest: Run) -> None:
    result = run_pytest(
        """
        def test_it(record_property):
            record_property("cannot", lambda: 0)
            record_property("can", 1)
            class Local(Exception): pass
            raise Local("of a local class")
        """,
        "--nsbox-all",
        conftest="""
        import pytest

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item):
            report = yield
            report.attached = lambda: 0
            return report

        def pytest_runtest_logreport(report):
            if report.when == "call":
                print("properties", report.user_properties, hasattr(report, "attached"))
        """,
    )
    result.assert_outcomes(failed=1)
    assert "properties [('can', 1)] False" in result.stdout.str()
    assert "Local: of a local class" in result.stdout.str()


def test_directories_passed_through_are_kept(run_pytest: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nnsbox_passthrough = kept")
    result = run_pytest(
        """
        import pathlib

        def test_it(request, pytestconfig):
            for name in ("kept", "too", "lost"):
                pathlib.Path(name).mkdir(exist_ok=True)
                pathlib.Path(name, "file").touch()
        """,
        *("--nsbox-all", "--nsbox-passthrough=too"),
    )
    result.assert_outcomes(passed=1)
    assert [name for name in ("kept", "too", "lost") if (pytester.path / name).exists()] == [
        "kept",
        "too",
    ]


def test_a_plugin_with_phases_of_its_own_is_named_in_a_warning(run_pytest: Run) -> None:
    result = run_pytest(
        "def test_it(): pass",
        "--nsbox-all",
        conftest="""
        def pytest_runtest_protocol(item):
            return True
        """,
    )
    result.stdout.fnmatch_lines(["*test_it.py::test_it has run outside*"])


def spawn(pytester: pytest.Pytester, *options: str) -> Any:
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--nsbox-all", *options]
    return pexpect.spawn(
        sys.executable, command, cwd=str(pytester.path), encoding="utf-8", timeout=60
    )


@pytest.mark.parametrize("way", ["--pdb", "--trace", "breakpoint"])
def test_the_debugger_is_inside(pytester: pytest.Pytester, way: str) -> None:
    call = "breakpoint()" if way == "breakpoint" else "assert value == 0"
    pytester.makepyfile(f"def test_it():\n    value = 7\n    {call}\n")
    child = spawn(pytester, *([way] if way.startswith("--") else []))
    child.expect_exact("(Pdb) ")
    child.sendline("import os; print('in', os.getppid(), os.uname().nodename)")
    child.expect("in 0 nsbox1")
    child.expect_exact("(Pdb) ")
    child.sendline("c" if way == "breakpoint" else "q")
    child.expect("1 passed" if way == "breakpoint" else "Quitting debugger|1 failed")
    child.expect(pexpect.EOF)
    assert not re.search("INTERNALERROR", child.before or "")


def test_a_container_that_has_died_before_its_body_came_is_said_to_have(
    run_pytest: Callable[..., pytest.RunResult],
) -> None:
    result = run_pytest(
        "def test_it(): pass",
        "--nsbox-all",
        conftest="""
        def pytest_nsbox_container_started(container):
            container.kill()
            container.wait_until(container.death)
        """,
    )
    assert result.parseoutcomes() == {"errors": 1}
    result.stdout.fnmatch_lines(["*container 'nsbox1' has been killed"])


def test_a_container_that_no_body_has_come_to_leaves_no_descriptor() -> None:
    with Session() as session:
        session.container().close()
        before = os.listdir("/proc/self/fd")
        session.container(body=()).close()
        assert os.listdir("/proc/self/fd") == before
