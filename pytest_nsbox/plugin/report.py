"""What a failing test's report says of its containers, and the end of the run."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest

from pytest_nsbox.plugin.specs import runs_inside, uses_fixture


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the state of the test's containers and the end of what ran in them."""
    if not runs_inside(item) and not uses_fixture(item):
        return (yield)
    only_ours = call.excinfo is not None and _cut_traceback(item, call.excinfo)
    report = yield
    if only_ours and call.excinfo is not None:
        notes = getattr(call.excinfo.value, "__notes__", [])
        report.longrepr = "\n".join([f"{item.nodeid}: {call.excinfo.value}", *notes])
    if call.when == "call" and uses_fixture(item):
        _add_containers(item, report)
    return report


def _add_containers(item: pytest.Item, report: pytest.TestReport) -> None:
    from pytest_nsbox.errors import ContainerTimeout
    from pytest_nsbox.plugin.boxes import containers_of

    for container in containers_of(item):
        death = container.settle()
        if report.passed and isinstance(death, ContainerTimeout):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {death}"
        if report.failed:
            report.sections.append((f"nsbox {container.name}", container.summary()))


def _cut_traceback(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """End the traceback of an expected error at the line that asked for it.

    True when there is no such line: a fixture of ours was asked for, and the message is all.
    """
    from pytest_nsbox.errors import NsboxError

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


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Take the session down; what stays behind is said, and fails the run."""
    try:
        yield
    finally:
        _close(session)


def _close(session: pytest.Session) -> None:
    if "pytest_nsbox.plugin.boxes" not in sys.modules:
        return
    from pytest_nsbox.errors import NsboxError
    from pytest_nsbox.plugin.boxes import opened

    boxes = opened(session.config)
    if boxes is None:
        return
    try:
        boxes.session.close()
    except NsboxError as error:
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"nsbox: {error}", red=True)
        if session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
