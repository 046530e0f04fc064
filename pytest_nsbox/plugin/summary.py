"""What the end of a run says: what has been left behind, and what bodies have changed."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from pytest_nsbox.plugin import options

_SUMMARY = pytest.StashKey["Summary"]()
_FINE = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
_SHOWN = 20  # of the changes of one test, without -v


def summary_of(config: pytest.Config) -> Summary:
    """The one of this run, a plugin of it from when it is first asked for."""
    if _SUMMARY not in config.stash:
        config.stash[_SUMMARY] = Summary()
        config.pluginmanager.register(config.stash[_SUMMARY], "nsbox-summary")
    return config.stash[_SUMMARY]


class Summary:
    def __init__(self) -> None:
        self.left: list[str] = []

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """What stays behind fails a strict run."""
        try:
            return (yield)
        finally:
            if hasattr(session.config, "workeroutput"):
                session.config.workeroutput["nsbox_left"] = self.left
            strict = options.is_on(session.config, "strict")
            if self.left and strict and session.exitstatus in _FINE:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended, and says what it has left."""
        left = (getattr(node, "workeroutput", None) or {}).get("nsbox_left", ())
        self.left += [f"{node.gateway.id}: {line}" for line in left]

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        if self.left:
            terminalreporter.section("nsbox: not taken down", red=True)
            for line in self.left:
                terminalreporter.line(line)
        if options.is_on(config, "changes"):
            _tell_changes(terminalreporter)


def add_changes(report: Any, changes: list[tuple[str, str]]) -> None:
    """Have a report carry them, also from one of pytest-xdist's workers."""
    report.nsbox_changes = changes
    report.sections.append(("nsbox changes", "\n".join(map(_line, changes))))


def _line(change: tuple[str, str]) -> str:
    path, kind = change
    return f"{kind:7} {path}"


def _tell_changes(terminalreporter: Any) -> None:
    """Name what each test has changed, in the order in which they ended."""
    found: dict[str, dict[str, str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for path, kind in getattr(report, "nsbox_changes", ()):
                found.setdefault(report.nodeid, {})[path] = kind
    terminalreporter.section("nsbox: changed by bodies, and gone")
    if not found:
        terminalreporter.line("nothing outside tmp_path and the paths passed through")
    shown = None if terminalreporter.verbosity > 0 else _SHOWN
    for nodeid, changes in found.items():
        terminalreporter.line(nodeid)
        rows = list(changes.items())
        for row in rows[:shown]:
            terminalreporter.line(f"  {_line(row)}")
        if len(rows[:shown]) < len(rows):
            terminalreporter.line(f"  and {len(rows[shown:])} more; all of them with -v")
