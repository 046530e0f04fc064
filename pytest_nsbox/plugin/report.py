"""What a failing test's report says of its containers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from typing import Any

import pytest

from pytest_nsbox.errors import ContainerDied, ContainerTimeout, NsboxError
from pytest_nsbox.plugin.boxes import containers_of
from pytest_nsbox.session.container import Container

_SHOWN = 20  # of the changes of one test, without -v


def add_containers(item: pytest.Item, report: pytest.TestReport) -> None:
    """The state of each container, and the end of what ran in it."""
    for container in containers_of(item):
        if report.passed and container.spec.timeout is None:  # nothing that could be told
            continue
        death = container.settle()
        if report.passed and isinstance(death, ContainerTimeout):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {death}"
        if report.failed:
            report.sections.append((f"nsbox {container.name}", container.summary()))


def changed_by_body(container: Container) -> list[tuple[str, str]]:
    """What a body has written that goes with its container, as (path, kind)."""
    try:
        changes = container.changes()
    except ContainerDied as error:
        return [(f"(unknown: {error})", "")]
    return [
        (os.fsencode(change.path).decode(errors="backslashreplace"), change.kind)
        for change in changes
        if "__pycache__" not in change.path.split("/")  # Python's doing, wherever it imports
    ]


def add_changes(report: Any, changes: list[tuple[str, str]]) -> None:
    """Have a report carry them, also from one of pytest-xdist's workers."""
    report.nsbox_changes = changes
    report.sections.append(("nsbox changes", "\n".join(map(_line, changes))))


def _line(change: tuple[str, str]) -> str:
    path, kind = change
    return f"{kind:7} {path}"


def tell_changes(terminalreporter: Any) -> None:
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


def cut_traceback(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """End the traceback of an expected error at the line that asked for it.

    True when there is no such line: a fixture of ours was asked for, and the message is all.
    """
    expected = (NsboxError, OSError, subprocess.SubprocessError)
    if item.config.getoption("fulltrace", False) or not isinstance(excinfo.value, expected):
        return False
    entries = []
    entry = excinfo.tb
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next  # type: ignore[assignment]
    last = len(entries)
    while last and entries[last - 1].tb_frame.f_code.co_filename.startswith(_OURS):
        last -= 1
    if last == len(entries) or not last:
        return False
    if entries[last - 1].tb_frame.f_globals.get("__name__", "").startswith(("_pytest", "pluggy")):
        return isinstance(excinfo.value, NsboxError)
    entries[last - 1].tb_next = None
    return False


_OURS = (
    os.path.dirname(os.path.dirname(__file__)),
    contextlib.__file__,
    subprocess.__file__,
    socket.__file__,
)
