"""The pytest plugin: hooks and fixtures, handed on from the files that hold them."""

from pytest_nsbox.plugin.collection import (
    pytest_collection_finish,
    pytest_make_collect_report,
    pytest_report_collectionfinish,
)
from pytest_nsbox.plugin.elsewhere import pytest_runtest_setup
from pytest_nsbox.plugin.fixtures import (
    nsbox_container,
    nsbox_container_factory,
    nsbox_network_factory,
    nsbox_session,
    nsbox_spec,
)
from pytest_nsbox.plugin.hooks import (
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_runtestloop,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from pytest_nsbox.plugin.options import pytest_addhooks, pytest_addoption, pytest_configure

__all__ = [
    "nsbox_container",
    "nsbox_container_factory",
    "nsbox_network_factory",
    "nsbox_session",
    "nsbox_spec",
    "pytest_addhooks",
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_configure",
    "pytest_make_collect_report",
    "pytest_report_collectionfinish",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_runtest_setup",
    "pytest_runtestloop",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
]
