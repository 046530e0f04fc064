"""What a failing test's report says of its containers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Generator
from typing import Any

import pytest

from pytest_nsbox.errors import ContainerDied, ContainerTimeout, NsboxError
from pytest_nsbox.plugin.boxes import boxes_of, containers_of
from pytest_nsbox.plugin.crowd import warn_of_sum
from pytest_nsbox.plugin.options import uses_fixture
from pytest_nsbox.session.container import Container


def reported(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What pytest_runtest_makereport does for a test with a container."""
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
