"""What a run says that is about none of its tests, also from one of pytest-xdist's workers."""

from __future__ import annotations

import warnings

import pytest

_OURS = "nsbox"  # in place of a file
_ALONE = {"workercount": 1, "workerid": "gw0"}


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is one of pytest-xdist's; it has no terminal then."""
    return hasattr(config, "workerinput")


def workers(config: pytest.Config) -> int:
    return int(getattr(config, "workerinput", _ALONE)["workercount"])


def is_first_worker(config: pytest.Config) -> bool:
    """Whether it is this process that says what holds for all."""
    return bool(getattr(config, "workerinput", _ALONE)["workerid"] == "gw0")


def tell(config: pytest.Config, text: str) -> None:
    """Have it in the summary of warnings, and never as an error."""
    message = warnings.WarningMessage(
        pytest.PytestWarning(f"nsbox: {text}"), pytest.PytestWarning, _OURS, 0
    )
    config.hook.pytest_warning_recorded.call_historic(
        kwargs={"warning_message": message, "when": "collect", "nodeid": "", "location": None}
    )


class Controller:
    """What pytest-xdist's workers tell is shown as it comes, before the first test has ended."""

    def __init__(self, config: pytest.Config) -> None:
        self._manager = config.pluginmanager

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        reporter = self._manager.get_plugin("terminalreporter")
        if warning_message.filename == _OURS and reporter:
            reporter.ensure_newline()
            reporter.write_line(str(warning_message.message))
