"""What pytest-cov has measured of bodies inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import coverage
import pytest

Run = Callable[..., pytest.RunResult]


def test_lines_run_inside_are_in_the_report_of_pytest_cov(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        lib="""
        def inside():
            a = 1
            return a

        def outside():
            a = 1
            return a

        def never():
            return 3
        """
    )
    source = """
        import pytest, lib

        @pytest.mark.sandbox
        def test_inside():
            lib.inside()

        def test_outside():
            lib.outside()
    """
    result = run_pytest(
        source, "-p", "pytest_cov", "--cov=lib", "--cov-report=term-missing", "--cov-context=test"
    )
    result.assert_outcomes(passed=2)
    result.stdout.re_match_lines([r"lib.py +8 +1 +88% +10"])
    result = run_pytest(
        source, *("-p", "pytest_cov", "-p", "xdist", "-n1", "--cov=lib", "--cov-report=term")
    )
    result.stdout.re_match_lines([r"lib.py +8 +1 +88%"])


MEASURED = """
    from pytest_nsbox.plugin import measured

    seen, times, add, write = [], [], measured.Writer.add, measured.Writer.write

    def count(self, rows):
        seen.append(sum(len(lines) for _, _, found in rows for lines in found.values()))
        add(self, rows)

    def time(self):
        times.append(bool(self._found))
        write(self)

    measured.Writer.add, measured.Writer.write = count, time

    def pytest_runtest_logstart():
        import lib
        lib.outside()

    def pytest_unconfigure():
        print(f"each of {len(seen)} brought {set(seen)}, written {sum(times)} times")
"""


@pytest.mark.parametrize("branch", [(), ("--cov-branch",)])
@pytest.mark.parametrize("context", [(), ("--cov-context=test",)])
def test_coverage_is_that_of_a_plain_run_line_by_line(
    run_pytest: Run,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    branch: tuple[str, ...],
    context: tuple[str, ...],
) -> None:
    """Also what is measured outside: imports, wider fixtures, their teardown."""
    if context:  # by sys.monitoring, as from Python 3.14 on, a plain run has a line in one context
        monkeypatch.setenv("COVERAGE_CORE", "ctrace")
    pytester.makepyfile(
        lib="""
        def work(n):
            if n > 1:
                return n
            return 0

        def shared(): return 1

        def shared_no_more(): return 2
        """
    )
    source = """
        import lib, pytest

        @pytest.fixture(scope="module", autouse=True)
        def wide():
            yield lib.shared()
            lib.shared_no_more()

        @pytest.mark.parametrize("n", range(3))
        def test_it(n):
            lib.work(n)
    """
    found = []
    for inside in ((), ("--nsbox-all",)):
        run_pytest(
            source, "-p", "pytest_cov", "--cov=lib", "--cov-report=", *branch, *context, *inside
        ).assert_outcomes(passed=3)
        with contextlib.closing(coverage.CoverageData(pytester.path / ".coverage")) as data:
            data.read()
            found.append({})
            for name in data.measured_contexts():
                data.set_query_context(name)
                for file in data.measured_files():
                    lines, arcs = data.lines(file), data.arcs(file)
                    found[-1][name, file] = (sorted(lines or ()), sorted(arcs or ()))
    assert found[0] == found[1]
    assert len(found[0]) == 1 + len(context) * 5


def test_the_lines_that_bodies_bring_out_do_not_grow_and_are_written_at_once(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    lib = "".join(f"def work{n}():\n    return {n}\n\n" for n in range(40))
    pytester.makepyfile(lib=lib + "def outside():\n    pass\n")
    result = run_pytest(
        """
        import lib, pytest

        @pytest.mark.parametrize("n", range(40))
        def test_it(n):
            getattr(lib, f"work{n}")()
        """,
        *("-p", "pytest_cov", "--cov=lib", "--cov-report=", "--nsbox-all"),
        conftest=MEASURED,
    )
    result.assert_outcomes(passed=40)
    result.stdout.fnmatch_lines(["each of 40 brought {1}, written 1 times"])
