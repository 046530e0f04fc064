"""The hooks of a test's run. What they do is imported when there is something to do: a run
without containers pays nothing for it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from pytest_nsbox.plugin.specs import runs_inside, uses_fixture


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Take over the phases of the tests that run inside."""
    if not runs_inside(item):
        return (yield)
    from pytest_nsbox.plugin.inside import taken_over

    with taken_over(item, nextitem):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the state of the test's containers and the end of what ran in them."""
    if not runs_inside(item) and not uses_fixture(item):
        return (yield)
    from pytest_nsbox.plugin.report import add_containers, cut_traceback

    only_ours = call.excinfo is not None and cut_traceback(item, call.excinfo)
    report = yield
    if only_ours and call.excinfo is not None:
        notes = getattr(call.excinfo.value, "__notes__", [])
        report.longrepr = "\n".join([f"{item.nodeid}: {call.excinfo.value}", *notes])
    if call.when == "call" and uses_fixture(item):
        add_containers(item, report)
    return report


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
