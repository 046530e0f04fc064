"""The lines that bodies have run, as coverage.py measures them: noted inside, written outside.

coverage.py keeps its data in a database, and one for each body would take longer than the body. So
in a fork what it writes there is only noted, and what many have brought out is written at once.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

Row = tuple[str | None, str, dict[str, Any]]  # the context, the method of its data, what for it

_WRITER = pytest.StashKey["Writer"]()


def current() -> Any:
    """The measurement that is going on, the last of them; None if there is none."""
    coverage = sys.modules.get("coverage")
    return None if coverage is None else coverage.Coverage.current()


class Notes:
    """In a fork, in place of the data of what measures there."""

    def __init__(self, coverage: Any) -> None:
        self._coverage = coverage
        self._collector = coverage._collector
        self._context: str | None = _context(self._collector.covdata)
        self._rows: list[Row] = []
        self._collector.covdata = self
        # what ran before the fork is the parent's to write
        self._collector.flush_data()
        self._rows.clear()

    def close(self) -> list[Row]:
        self._coverage.stop()
        self._collector.flush_data()
        return self._rows

    # ------------------------------------------------------------------ coverage.CoverageData

    def set_context(self, context: str | None) -> str | None:
        before, self._context = self._context, context
        return before

    def add_lines(self, lines: dict[str, Any]) -> None:
        self._note("add_lines", lines)

    def add_arcs(self, arcs: dict[str, Any]) -> None:
        self._note("add_arcs", arcs)

    def add_file_tracers(self, tracers: dict[str, str]) -> None:
        self._note("add_file_tracers", tracers)

    def _note(self, method: str, found: dict[str, Any]) -> None:
        if found:
            self._rows.append((self._context, method, found))


class Writer:
    """In the pytest process: gathers until another context comes, or the run ends."""

    def __init__(self, coverage: Any) -> None:
        self._coverage = coverage
        coverage.get_data()  # what has been measured up to now is not in each fork's way
        self._context: str | None = None
        self._found: dict[str, dict[str, Any]] = {}

    def add(self, rows: list[Row]) -> None:
        for context, method, found in rows:
            if context != self._context:
                self.write()
                self._context = context
            gathered = self._found.setdefault(method, {})
            for file, value in found.items():
                if isinstance(value, str):
                    gathered[file] = value
                else:
                    gathered.setdefault(file, set()).update(value)

    def write(self) -> None:
        found, self._found = self._found, {}
        if not found:
            return
        data = self._coverage.get_data()
        own = _context(data)
        data.set_context(self._context)
        for method in ("add_lines", "add_arcs", "add_file_tracers"):  # of files that are known
            if method in found:
                getattr(data, method)(found[method])
        data.set_context(own)


def begin(config: pytest.Config) -> None:
    """Before a body is forked."""
    coverage = current()
    if coverage is not None and _WRITER not in config.stash:
        config.stash[_WRITER] = Writer(coverage)


def add(config: pytest.Config, rows: list[Row]) -> None:
    """What one body has brought out."""
    config.stash[_WRITER].add(rows)


def end(config: pytest.Config) -> None:
    """Write what has not been written yet."""
    if _WRITER in config.stash:
        config.stash[_WRITER].write()


def _context(data: Any) -> str | None:
    """The one that coverage.py is told to write under (its static one, or a test's)."""
    context: str | None = data._current_context
    return context
