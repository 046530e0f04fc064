"""Hooks that pytest-nsbox calls: implement them in a conftest.py or a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_nsbox.model.rootfs import Rootfs
    from pytest_nsbox.model.spec import SandboxSpec
    from pytest_nsbox.session.container import Container


@pytest.hookspec(firstresult=True)
def pytest_nsbox_configure_spec(item: pytest.Item, spec: SandboxSpec) -> SandboxSpec | None:
    """Change what a test's container is like: return another spec (`spec.replace(...)`)."""


@pytest.hookspec(firstresult=True)
def pytest_nsbox_resolve_rootfs(source: str) -> Rootfs | None:
    """Say what a root filesystem source means; None leaves it to others."""


@pytest.hookspec
def pytest_nsbox_container_started(container: Container, item: pytest.Item) -> None:
    """A container of a test is running."""


@pytest.hookspec
def pytest_nsbox_container_stopping(container: Container, item: pytest.Item) -> None:
    """A container of a test is about to be taken down."""


@pytest.hookspec
def pytest_nsbox_pack(item: pytest.Item) -> Any:
    """In a body inside, when it has been torn down: return what is to be brought out of the
    memory of its process, something that can be pickled."""


@pytest.hookspec
def pytest_nsbox_unpack(item: pytest.Item, packed: list[Any]) -> None:
    """Outside, after that: all that `pytest_nsbox_pack` has returned, yours among it."""
