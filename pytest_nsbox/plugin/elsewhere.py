"""Systems other than Linux: nothing that needs it is imported, and a test that needs it says so.

The modules behind the fixtures stand on what only Linux has (fcntl, namespaces), so they must not
be reached there.
"""

from __future__ import annotations

import sys

import pytest

from pytest_nsbox.errors import not_linux
from pytest_nsbox.plugin import options


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture is set up."""
    if not options.wants_container(item):
        return
    message = not_linux(sys.platform)
    if options.value(item.config, "unsupported") == "skip":
        pytest.skip(f"nsbox: {message}")
    pytest.fail(f"{item.nodeid}: {message}", pytrace=False)
