"""What is set up and torn down when, with bodies inside: as outside, and as often."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.test_inside import normal

Run = Callable[..., pytest.RunResult]


def both(run_pytest: Run, source: str, *options: str, **files: str) -> pytest.RunResult:
    """Run a suite outside and inside; what they print must be the same. Returns the latter."""
    outside = run_pytest(source, *options, **files)
    inside = run_pytest(source, "--nsbox-all", *options, **files)
    assert "tests inside containers" in inside.stdout.str()
    assert normal(inside.stdout.str()) == normal(outside.stdout.str())
    assert inside.parseoutcomes() == outside.parseoutcomes()
    assert inside.ret == outside.ret
    return inside


def test_a_hook_that_skips_does_so_before_wider_fixtures_are_set_up(run_pytest: Run) -> None:
    result = both(
        run_pytest,
        """
        import pytest

        @pytest.fixture(scope="module")
        def database():
            raise OSError("there is no database here")

        @pytest.mark.needs("database")
        def test_skipped(database): pass

        @pytest.mark.xfail(run=False)
        def test_not_run(database): pass

        @pytest.mark.skipif("no such thing")
        def test_mark_that_fails(database): pass

        @pytest.mark.needs("fail")
        def test_failed(database): pass

        @pytest.fixture(scope="module", params=[1, 2])
        def wide(request):
            print("wide set up")
            yield request.param
            print("wide torn down")

        def test_one(wide): assert not wide
        def test_two(wide): assert not wide
        """,
        "-rA",
        conftest="""
        import pytest

        def pytest_configure(config):
            config.addinivalue_line("markers", "needs(what)")

        def pytest_runtest_setup(item):
            for mark in item.iter_markers("needs"):
                print("hook called", item.name)
                if mark.args == ("fail",):
                    raise ValueError("of the hook")
                pytest.skip(f"needs {mark.args[0]}")
        """,
    )
    assert result.parseoutcomes() == {"skipped": 1, "xfailed": 1, "errors": 2, "failed": 4}


def test_a_test_that_is_not_run_needs_no_wider_fixture(run_pytest: Run) -> None:
    both(
        run_pytest,
        """
        import pytest

        @pytest.fixture(scope="module")
        def database():
            print("the database is set up")

        @pytest.mark.xfail(run=False)
        def test_not_run(database): pass

        @pytest.mark.skipif("no such thing")
        def test_mark_that_fails(database): pass
        """,
        *("-rA", "-s"),
    )


def test_wider_fixtures_that_are_overridden_are_set_up_once(run_pytest: Run) -> None:
    result = both(
        run_pytest,
        """
        import os, pytest

        @pytest.fixture
        def shared(shared):
            print("narrow")
            return [*shared, "function"]

        class TestIt:
            @pytest.fixture
            def shared(self, shared):
                return [*shared, "method"]

            @pytest.mark.parametrize("n", range(2))
            def test_both(self, n, shared):
                assert shared == ["main", "function", "method"]
                assert False

        @pytest.mark.parametrize("n", range(2))
        def test_one(n, shared):
            assert shared == ["main", "function"]
            assert False

        class TestHidden:
            @pytest.fixture
            def shared(self):
                return "hidden"

            def test_it(self, shared):
                assert shared == "hidden"
        """,
        "-rA",
        "-s",
        conftest="""
        import os, pytest

        os.environ["MAIN"] = str(os.getpid())

        @pytest.fixture(scope="session")
        def shared():
            print("wide set up")
            yield ["main" if os.environ["MAIN"] == str(os.getpid()) else "body"]
            print("wide torn down")
        """,
    )
    assert result.parseoutcomes() == {"failed": 4, "passed": 1}
    assert result.stdout.str().count("wide set up") == 1


def test_a_rerun_sets_up_what_it_does_outside(run_pytest: Run) -> None:
    """The last test of a module is torn down with its module, and set up with it."""
    both(
        run_pytest,
        """
        import pytest

        @pytest.fixture(scope="module")
        def wide():
            print("wide set up")
            yield
            print("wide torn down")

        @pytest.fixture
        def narrow(wide):
            print("narrow set up")
            yield
            print("narrow torn down")

        def test_first(narrow): assert 0
        def test_last(narrow): assert 0
        """,
        *("-p", "pytest_rerunfailures", "--reruns=2", "-s", "-rA"),
        test_next="def test_other(): pass",
    )


TEARDOWNS = """
    import pytest

    class Local(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    @pytest.fixture(scope="module")
    def outer():
        yield
        raise OSError("outer")

    @pytest.fixture(scope="class")
    def middle(outer):
        yield
        raise LookupError("middle")

    @pytest.fixture
    def inner():
        yield
        try:
            1 / 0
        except ZeroDivisionError as error:
            raise Local("inner", 2) from error

    @pytest.fixture
    def innermost():
        yield
        raise TypeError("innermost")
"""


def test_who_repeats_a_test_reports_on_its_set_up_itself(run_pytest: Run) -> None:
    result = both(
        run_pytest,
        """
        import pytest

        @pytest.fixture
        def broken():
            raise OSError("of the fixture")

        def test_it(broken): pass
        """,
        *("-p", "pytest_rerunfailures", "--reruns=2", "-rA"),
    )
    assert result.parseoutcomes() == {"errors": 1, "rerun": 2}


def test_a_class_scope_is_the_functions_where_there_is_no_class(run_pytest: Run) -> None:
    both(
        run_pytest,
        """
        import pytest

        @pytest.fixture(scope="class")
        def wide(request):
            print("set up for", request.node.name)
            yield
            print("torn down")

        def test_one(wide): pass
        def test_two(wide): pass

        class TestIt:
            def test_three(self, wide): pass
            def test_four(self, wide): pass
        """,
        *("-s", "-rA"),
    )


def test_a_rerun_tries_a_wider_fixture_that_has_failed_once_more(run_pytest: Run) -> None:
    both(
        run_pytest,
        """
        import pytest

        tries = []

        @pytest.fixture(scope="module")
        def other():
            print("other set up")
            yield
            print("other torn down")

        @pytest.fixture(scope="module")
        def flaky(other):
            tries.append(1)
            assert len(tries) > 2
            yield
            print("flaky torn down")

        def test_first(flaky): print("run")
        def test_last(broken): print("never run")

        @pytest.fixture(scope="module")
        def broken(other):
            assert 0
        """,
        *("-p", "pytest_rerunfailures", "--reruns=4", "-s", "-rA"),
        test_next="def test_other(): pass",
    )


def test_errors_of_teardowns_inside_and_outside_are_one_group(run_pytest: Run) -> None:
    source = (
        TEARDOWNS
        + """
    class TestIt:
        def test_it(self, inner, innermost, middle): pass
    """
    )
    outside = run_pytest(source)
    inside = run_pytest(source, "--nsbox-all")
    inside.assert_outcomes(passed=1, errors=1)
    text = "\n".join(group(inside))
    assert "ExceptionGroup: errors during test teardown (3 sub-exceptions)" in text
    assert "ExceptionGroup: errors while tearing down <Function test_it> (2 sub-" in text
    for name in ("outer", "middle", "inner", "innermost"):
        assert f"in {name}" in text
    assert group(inside) == group(outside)


def group(result: pytest.RunResult) -> list[str]:
    """What is shown of an exception group, without the lines of pytest on the way."""
    shown, ours = [], True
    for line in result.stdout.lines:
        if " | " in line and ('File "' in line or "Error: " in line or "Group: " in line):
            ours = 'File "' not in line or "test_it.py" in line
        if line.lstrip().startswith(("|", "+")) and ours:
            shown.append(line)
    return shown


def test_errors_of_the_bodys_teardown_alone_are_as_ever(run_pytest: Run) -> None:
    both(run_pytest, f"{TEARDOWNS}    def test_it(inner): pass\n", "-rA", "--tb=short")
    source = f"{TEARDOWNS}    def test_it(inner, innermost): pass\n"
    outside, inside = run_pytest(source), run_pytest(source, "--nsbox-all")
    inside.assert_outcomes(passed=1, errors=1)
    assert "errors while tearing down <Function test_it> (2 sub-" in "\n".join(group(inside))
    assert group(inside) == group(outside)


def test_an_interrupt_between_two_phases_tears_the_fixtures_down(
    pytester: pytest.Pytester, run_pytest: Run
) -> None:
    """The body waits then to be told of the next."""
    result = both(
        run_pytest,
        """
        import pathlib
        import pytest

        @pytest.fixture
        def words():
            words = pathlib.Path("words").absolute()
            yield words
            (words / f"torn-down{len(list(words.iterdir()))}").touch()

        def test_it(words): pass
        """,
        "-onsbox_passthrough=words",
        conftest="""
        import os
        import signal

        def pytest_configure():
            os.makedirs("words", exist_ok=True)

        def pytest_runtest_logreport(report):
            if report.when == "call":
                signal.raise_signal(signal.SIGINT)
        """,
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert len(list((pytester.path / "words").iterdir())) == 2


def test_who_hears_of_reports_hears_of_a_phase_before_the_next_begins(
    pytester: pytest.Pytester, run_pytest: Run
) -> None:
    pytester.mkdir("marks")
    result = both(
        run_pytest,
        """
        import pathlib
        import pytest

        @pytest.fixture
        def marks(n):
            yield pathlib.Path("marks").absolute()
            assert pathlib.Path(f"marks/call{n}").exists()

        @pytest.mark.parametrize("n", range(8))
        def test_it(marks, n):
            assert (marks / f"setup{n}").exists()
        """,
        "-onsbox_passthrough=marks",
        conftest="""
        import os
        import pathlib

        def pytest_runtest_logreport(report):
            number = report.nodeid.partition("[")[2].rstrip("]")
            os.sync()  # it takes a moment
            pathlib.Path("marks", f"{report.when}{number}").touch()

        def pytest_sessionfinish():
            for path in pathlib.Path("marks").iterdir():
                path.unlink()
        """,
    )
    assert result.parseoutcomes() == {"passed": 8}
