"""Whether the workers of a run may together ask for more memory than the machine has."""

from __future__ import annotations

import contextlib
import os
import warnings

import pytest

from pytest_nsbox.errors import NsboxError
from pytest_nsbox.model.units import format_size
from pytest_nsbox.plugin.specs import defaults, keywords


def warn_of_crowd(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Limits are no reservations; but where the largest of every worker at once is more than
    there is, the kernel will have to kill something that no limit is to blame for.

    It is told in the summary of warnings, and is no error where warnings are.
    """
    worker = getattr(config, "workerinput", {"workercount": 1, "workerid": "gw0"})
    if worker["workerid"] != "gw0":  # all have collected the same
        return
    workers = int(worker["workercount"])
    largest = max((_memory(item) for item in items), default=0)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if workers * largest <= there:
        return
    text = (
        f"nsbox: {workers} at once with memory={format_size(largest)} each may use more than the "
        f"{format_size(there)} of this machine; take fewer workers (-n) or less memory="
    )
    message = warnings.WarningMessage(pytest.PytestWarning(text), pytest.PytestWarning, "nsbox", 0)
    config.hook.pytest_warning_recorded.call_historic(
        kwargs={"warning_message": message, "when": "collect", "nodeid": "", "location": None}
    )


def _memory(item: pytest.Item) -> int:
    with contextlib.suppress(NsboxError):
        return defaults(item.config).replace(**keywords(item)).memory or 0
    return 0
