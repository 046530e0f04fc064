"""--nsbox-changes: what each body has changed, and what went with its container."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

HEADING = "*nsbox: changed by bodies, and gone*"
SUITE = """
import os, pathlib, pytest

def test_writes(tmp_path):
    (tmp_path / "kept").write_text("")
    pathlib.Path("passed/kept").write_text("")
    pathlib.Path("/etc/nsbox-written").write_text("")
    pathlib.Path("/tmp/nsbox-written").write_text("")
    pathlib.Path("beside.txt").write_text("")
    os.remove("data.txt")

@pytest.fixture
def at_the_end():
    yield
    os.chmod("data.txt", 0o600)

def test_fails(at_the_end):
    assert 0

def test_ends_its_process():
    pathlib.Path("/etc/nsbox-crashed").write_text("")
    os._exit(3)

def test_writes_nothing():
    __import__("other")

@pytest.mark.skip
def test_skipped():
    pass
"""


def rows(result: pytest.RunResult) -> list[str]:
    """The lines of the summary's section."""
    lines = result.outlines
    (start,) = (n for n, line in enumerate(lines) if "nsbox: changed by bodies" in line)
    end = next(n for n, line in enumerate(lines[start + 1 :], start + 1) if line.startswith("="))
    return [line for line in lines[start + 1 : end] if line]


@pytest.mark.parametrize("more", [(), ("-p", "xdist", "-n2")], ids=["alone", "xdist"])
def test_the_summary_names_what_each_body_has_changed(
    run_pytest: Run, pytester: pytest.Pytester, more: tuple[str, ...]
) -> None:
    pytester.mkdir("passed")
    pytester.path.joinpath("data.txt").touch()
    here = pytester.path
    result = run_pytest(
        SUITE, "--nsbox-all", "--nsbox-changes", "--nsbox-passthrough=passed", *more, other=""
    )
    result.assert_outcomes(passed=2, failed=2, skipped=1)
    found = rows(result)
    tests = [line for line in found if not line.startswith(" ")]
    changes: dict[str, list[list[str]]] = {name: [] for name in tests}
    for line in found:
        if line in changes:
            name = line
        else:
            changes[name].append(line.split())
    assert changes == {
        "test_it.py::test_writes": [
            ["added", "/etc/nsbox-written"],
            *sorted(
                [
                    ["added", f"{here}/beside.txt"],
                    ["deleted", f"{here}/data.txt"],
                    ["added", "/tmp/nsbox-written"],
                ],
                key=lambda row: row[1],
            ),
        ],
        "test_it.py::test_fails": [["changed", f"{here}/data.txt"]],
        "test_it.py::test_ends_its_process": [["added", "/etc/nsbox-crashed"]],
    }
    assert os.path.exists(here / "passed/kept")
    assert not os.path.exists(here / "beside.txt")


@pytest.mark.parametrize("where", ["ini", "environment"])
def test_it_can_be_asked_for_elsewhere(
    run_pytest: Run, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    options = ["--nsbox-all"]
    if where == "ini":
        options += ["-o", "nsbox_changes=true"]
    else:
        monkeypatch.setenv("PYTEST_NSBOX_CHANGES", "1")
    result = run_pytest("def test_it(): pass", *options)
    assert rows(result) == ["nothing outside tmp_path and the paths passed through"]


def test_nothing_is_said_unless_asked_for(run_pytest: Run) -> None:
    result = run_pytest("def test_it(): open('/etc/nsbox-written', 'w')", "--nsbox-all")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line(HEADING)


def test_many_changes_are_cut_short_without_v(run_pytest: Run) -> None:
    source = """
        def test_it():
            for n in range(30):
                open(f"/etc/nsbox-{n:02}", "w").close()
        """
    short = rows(run_pytest(source, "--nsbox-all", "--nsbox-changes"))
    assert short[-1].strip() == "and 10 more; all of them with -v"
    assert short[20].split() == ["added", "/etc/nsbox-19"]
    long = rows(run_pytest(source, "--nsbox-all", "--nsbox-changes", "-v"))
    assert long[-1].split() == ["added", "/etc/nsbox-29"]


def test_the_report_carries_them(run_pytest: Run) -> None:
    result = run_pytest(
        "def test_it(): open(b'/etc/nsbox-\\xff', 'w')",
        *("--nsbox-all", "--nsbox-changes", "-p", "xdist", "-n1"),
        conftest="""
        def pytest_runtest_logreport(report):
            if hasattr(report, "nsbox_changes"):
                ((path, kind),) = report.nsbox_changes
                print()
                print("carried", report.when, kind, path, report.sections[-1][0])
        """,
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([r"carried teardown added /etc/nsbox-\xff nsbox changes"])
