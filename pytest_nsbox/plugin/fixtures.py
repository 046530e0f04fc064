"""The fixtures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nsbox.plugin.specs import spec_of

if TYPE_CHECKING:
    from pytest_nsbox.model.spec import SandboxSpec
    from pytest_nsbox.session.container import Container
    from pytest_nsbox.session.network import Network
    from pytest_nsbox.session.session import Session


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
