"""The pytest plugin: its hooks and its fixtures.

Every run of pytest reads this file and the two beside it that it imports, also where no test wants
a container. So they are few, and what there is to do is imported when there is something to do.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nsbox.plugin import options
from pytest_nsbox.plugin.options import (
    marked,
    on_linux,
    pytest_addhooks,
    pytest_addoption,
    pytest_configure,
    runs_inside,
    uses_fixture,
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
    "pytest_addhooks",
    "pytest_addoption",
    "pytest_configure",
]

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
    if session.config.option.collectonly or session.testsfailed or not on_linux():
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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture is set up: on another system nothing that needs Linux is imported, and a
    test that needs it says so. What is behind the fixtures stands on what only Linux has."""
    if on_linux() or not wants_container(item):
        return
    from pytest_nsbox.errors import not_linux

    message = not_linux(sys.platform)
    if options.value(item.config, "unsupported") == "skip":
        pytest.skip(f"nsbox: {message}")
    pytest.fail(f"{item.nodeid}: {message}", pytrace=False)


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
    if not wants_container(item) or not on_linux():
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
