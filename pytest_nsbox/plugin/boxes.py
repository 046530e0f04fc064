"""What the plugin holds during a run that has containers: one session, and those of each test."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import pytest

from pytest_nsbox.errors import NsboxError, RootfsError, UnsupportedError
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.model.spec import SandboxSpec
from pytest_nsbox.plugin import measured, options
from pytest_nsbox.plugin.specs import defaults
from pytest_nsbox.plugin.summary import summary_of
from pytest_nsbox.session.container import Container
from pytest_nsbox.session.session import Session

_BOXES = pytest.StashKey["Boxes"]()
_CONTAINERS = pytest.StashKey[list[Container]]()


def boxes_of(config: pytest.Config) -> Boxes:
    """The one of this run, made when first asked for."""
    if _BOXES not in config.stash:
        summary_of(config)  # its hooks come after ours, being registered before
        config.stash[_BOXES] = Boxes(config)
        config.pluginmanager.register(config.stash[_BOXES], "nsbox-boxes")
    return config.stash[_BOXES]


def containers_of(item: pytest.Item) -> list[Container]:
    """The containers that a test has had, also those taken down."""
    return item.stash.setdefault(_CONTAINERS, [])


class Boxes:
    """Also a plugin of the run, which takes down what it has opened."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.session = Session(
            subnet=options.value(config, "subnet"),
            uplink=options.value(config, "uplink"),
            spec=defaults(config),
            pool=options.number(config, "pool"),
            resolve_rootfs=self._resolve_rootfs,
        )

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """What bodies have measured is written before plugins read it, when the loop has ended."""
        try:
            return (yield)
        finally:
            measured.end(self.config)

    def pytest_runtest_logstart(self) -> None:
        """Reap the bodies of tests before, but for one that has just been killed and needs a
        moment."""
        self.session.reap(most=1)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Take the session down, after what has been set up for the whole of it."""
        try:
            return (yield)
        finally:
            try:
                self.session.close()
            except NsboxError as error:
                summary_of(self.config).left += [str(error), *getattr(error, "__notes__", ())]

    def _resolve_rootfs(self, source: str) -> Rootfs | None:
        found = self.config.hook.pytest_nsbox_resolve_rootfs(source=source)
        if found is not None and not isinstance(found, Rootfs):
            raise RootfsError(f"a pytest_nsbox_resolve_rootfs hook gave {found!r}, not a Rootfs")
        return found

    def start(self) -> None:
        """Start the launcher; a host that cannot is reported by the tests that need it."""
        with contextlib.suppress(UnsupportedError):
            self.session.start()

    @contextlib.contextmanager
    def supported(self) -> Iterator[None]:
        """What this host cannot give is an error, or with --nsbox-unsupported=skip a skip."""
        try:
            yield
        except UnsupportedError as error:
            if options.value(self.config, "unsupported") == "skip":
                pytest.skip(f"nsbox: {error}")
            raise

    @contextlib.contextmanager
    def container(
        self,
        item: pytest.Item,
        name: str | None,
        spec: SandboxSpec,
        *,
        visible: Iterable[str] = (),
        **where: Any,
    ) -> Iterator[Container]:
        """A container of a test, with its hooks called."""
        ours = [str(self.config.rootpath), str(self.config.invocation_params.dir), *sys.path]
        with self.supported():
            container = self.session.container(
                name, spec=spec, visible=[*filter(None, ours), *visible], **where
            )
        containers_of(item).append(container)
        try:
            item.ihook.pytest_nsbox_container_started(container=container, item=item)
            try:
                yield container
            finally:
                item.ihook.pytest_nsbox_container_stopping(container=container, item=item)
        finally:
            # with others made ahead, the next test need not wait for the end of this one
            container.close(wait=not self.session.pool)
