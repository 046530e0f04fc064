"""What a failing test's report says of its containers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

import pytest

from pytest_nsbox.errors import ContainerTimeout, NsboxError
from pytest_nsbox.plugin.boxes import containers_of


def add_containers(item: pytest.Item, report: pytest.TestReport) -> None:
    """The state of each container, and the end of what ran in it."""
    for container in containers_of(item):
        death = container.settle()
        if report.passed and isinstance(death, ContainerTimeout):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {death}"
        if report.failed:
            report.sections.append((f"nsbox {container.name}", container.summary()))


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
