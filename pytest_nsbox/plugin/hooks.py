"""The hooks of a test's run. What they do is imported when there is something to do: a run
without containers pays nothing for it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from pytest_nsbox.plugin import options
from pytest_nsbox.plugin.elsewhere import on_linux
from pytest_nsbox.plugin.specs import runs_inside, uses_fixture


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Take over the phases of the tests that run inside."""
    _reap(item.config)
    if not runs_inside(item) or not on_linux():
        return (yield)
    from pytest_nsbox.plugin.inside import taken_over

    with taken_over(item, nextitem):
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """What bodies have measured is written before plugins read it, when the loop has ended."""
    try:
        return (yield)
    finally:
        if "pytest_nsbox.plugin.measured" in sys.modules:
            from pytest_nsbox.plugin import measured

            measured.end(session.config)


def _reap(config: pytest.Config) -> None:
    """The bodies of tests before, but for one that has just been killed and needs a moment."""
    if "pytest_nsbox.plugin.boxes" in sys.modules:
        from pytest_nsbox.plugin.boxes import opened

        boxes = opened(config)
        if boxes is not None:
            boxes.session.reap(most=1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the state of the test's containers and the end of what ran in them."""
    if not (runs_inside(item) or uses_fixture(item)) or not on_linux():
        return (yield)
    from pytest_nsbox.plugin.boxes import boxes_of
    from pytest_nsbox.plugin.crowd import warn_of_sum
    from pytest_nsbox.plugin.report import add_containers, cut_traceback

    only_ours = call.excinfo is not None and cut_traceback(item, call.excinfo)
    report = yield
    if only_ours and call.excinfo is not None:
        notes = getattr(call.excinfo.value, "__notes__", [])
        report.longrepr = "\n".join([f"{item.nodeid}: {call.excinfo.value}", *notes])
    if call.when == "call":
        warn_of_sum(item.config, boxes_of(item.config).session)
        if uses_fixture(item):
            add_containers(item, report)
    return report


_LEFT = pytest.StashKey[list[str]]()
_FINE = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Take the session down; what stays behind is said, and fails a strict run."""
    try:
        yield
    finally:
        _close(session.config)
        left = session.config.stash.get(_LEFT, [])
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["nsbox_left"] = left
        if left and options.is_on(session.config, "strict") and session.exitstatus in _FINE:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _close(config: pytest.Config) -> None:
    if "pytest_nsbox.plugin.boxes" not in sys.modules:
        return
    from pytest_nsbox.errors import NsboxError
    from pytest_nsbox.plugin.boxes import opened

    boxes = opened(config)
    if boxes is None:
        return
    try:
        boxes.session.close()
    except NsboxError as error:
        config.stash[_LEFT] = [str(error), *getattr(error, "__notes__", ())]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended, and says what it has left."""
    left = (getattr(node, "workeroutput", None) or {}).get("nsbox_left", ())
    node.config.stash.setdefault(_LEFT, []).extend(f"{node.gateway.id}: {line}" for line in left)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name what has been left behind, and what bodies have changed."""
    if left := config.stash.get(_LEFT, []):
        terminalreporter.section("nsbox: not taken down", red=True)
        for line in left:
            terminalreporter.line(line)
    if options.is_on(config, "changes"):
        from pytest_nsbox.plugin.report import tell_changes

        tell_changes(terminalreporter)
