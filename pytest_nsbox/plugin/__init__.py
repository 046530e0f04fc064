"""The pytest plugin: its fixtures, and the hooks that find what there is to do.

Every run of pytest reads this file and the two beside it that it imports, also where no test wants
a container. So they are small, and what there is to do is imported when there is something to do:
the hooks of a run that has containers are methods of `Boxes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nsbox.plugin.options import (
    check,
    is_on,
    marked,
    on_linux,
    pytest_addoption,
    runs_inside,
    wants_container,
)

if TYPE_CHECKING:
    from pytest_nsbox.model.spec import SandboxSpec
    from pytest_nsbox.session.container import Container
    from pytest_nsbox.session.network import Network
    from pytest_nsbox.session.session import Session

__all__ = [
    "nsbox_container",
    "nsbox_container_factory",
    "nsbox_network_factory",
    "nsbox_session",
    "nsbox_spec",
    "pytest_addoption",
]


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from pytest_nsbox.plugin import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Check the options; register what this run needs of the rest from its start on."""
    config.addinivalue_line(
        "markers",
        "sandbox(cpus=, memory=, pids=, network=, rootfs=, ...): run the test's body in a Linux "
        "container of its own; a test that takes nsbox_container stays outside and drives it",
    )
    check(config)
    if not on_linux():
        from pytest_nsbox.plugin import elsewhere

        config.pluginmanager.register(elsewhere)
    in_controller = config.getoption("dist", "no") != "no"  # of pytest-xdist
    if in_controller:
        from pytest_nsbox.plugin.telling import Controller

        config.pluginmanager.register(Controller(config))
    if in_controller or is_on(config, "changes"):
        from pytest_nsbox.plugin.summary import summary_of

        summary_of(config)


# ---------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def nsbox_session(pytestconfig: pytest.Config) -> Session:
    """The session of this run: `container()` and `network()` give context managers, for module-
    and session-scoped fixtures of your own."""
    from pytest_nsbox.plugin.boxes import boxes_of

    boxes = boxes_of(pytestconfig)
    with boxes.supported():
        boxes.session.start()
    return boxes.session


@pytest.fixture
def nsbox_spec() -> SandboxSpec | Mapping[str, Any]:
    """Defaults of the containers of a test: override it with a dict of marker keywords."""
    return {}


@pytest.fixture
def nsbox_container_factory(
    request: pytest.FixtureRequest, nsbox_session: Session, nsbox_spec: Any
) -> Iterator[Callable[..., Container]]:
    """Make containers: `nsbox_container_factory(name=None, **keywords)`, taken down with the
    test. The test's marker gives their defaults."""
    from pytest_nsbox.plugin.boxes import boxes_of
    from pytest_nsbox.plugin.specs import spec_of

    item = request.node
    boxes = boxes_of(request.config)
    with contextlib.ExitStack() as stack:

        def make(name: str | None = None, **keywords: Any) -> Container:
            spec = spec_of(item, nsbox_spec).replace(**keywords)
            return stack.enter_context(boxes.container(item, name, spec))

        yield make


@pytest.fixture
def nsbox_container(nsbox_container_factory: Callable[..., Container]) -> Container:
    """A running container, as the test's marker says."""
    return nsbox_container_factory()


@pytest.fixture
def nsbox_network_factory(nsbox_session: Session) -> Iterator[Callable[..., Network]]:
    """Make networks: `nsbox_network_factory(name=None, subnet=None, internet=True)`, removed
    with the test."""
    with contextlib.ExitStack() as stack:

        def make(
            name: str | None = None, *, subnet: str | None = None, internet: bool = True
        ) -> Network:
            return stack.enter_context(
                nsbox_session.network(name, subnet=subnet, internet=internet)
            )

        yield make


# ---------------------------------------------------------------------- collection


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A marker that cannot mean anything is an error where its test is collected."""
    report = yield
    items = [item for item in report.result or () if isinstance(item, pytest.Item) and marked(item)]
    if items and report.passed:
        from pytest_nsbox.plugin.collection import check_markers

        check_markers(report, items)
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the launcher while pytest still has other things to do."""
    if session.config.option.collectonly or not on_linux():
        return
    if any(map(wants_container, session.items)):
        from pytest_nsbox.plugin.collection import begin

        begin(session)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Say how many tests get containers, and which of them are not confined."""
    if not any(map(wants_container, items)):
        return []
    from pytest_nsbox.plugin.collection import describe

    return describe(config, items)


# ---------------------------------------------------------------------- tests


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Take over the phases of the tests that run inside."""
    if not runs_inside(item) or not on_linux():
        return (yield)
    from pytest_nsbox.plugin.inside import taken_over

    with taken_over(item, nextitem):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the state of the test's containers and the end of what ran in them."""
    if not wants_container(item) or not on_linux():
        return (yield)
    from pytest_nsbox.plugin.report import reported

    return (yield from reported(item, call))
