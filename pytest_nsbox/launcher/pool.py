"""Containers made ahead of the request, while tests run: each is given out once, and never again.

What is built ahead is what containers of one kind have in common; a name, an address and neighbours
come with the request, so nobody can tell by these whether a container comes from here.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pytest_nsbox.errors import NsboxError
from pytest_nsbox.kernel.mountinfo import MountWatch
from pytest_nsbox.launcher.container import Container
from pytest_nsbox.model.order import Order


@dataclass
class Kind:
    """What those of one kind are built by, and how many of them tests have had at once."""

    order: Order
    files: tuple[tuple[int, int] | None, ...]  # which files of the host its paths mean
    alive: int = 0
    most: int = 0
    ready: deque[Container] = field(default_factory=deque)


class Pool:
    """At most `size` containers in all; none with 0. `discard` takes one down that nobody has had,
    and raises nothing."""

    def __init__(
        self,
        size: int,
        begin: Callable[[Order], Container],
        discard: Callable[[Container], None],
    ) -> None:
        self.size = size
        self._begin = begin
        self._discard = discard
        self._kinds: list[Kind] = []  # the last one asked for last
        self._of: dict[int, Kind] = {}  # a living container's id: its kind
        self._mounts = MountWatch()
        self._mounted: object = None  # what was on the host when the first was begun

    def take(self, kind: Kind | None) -> Container | None:
        """One that can become what is ordered; None when it has to be built."""
        if kind is None:
            return None
        if self._mounted is not self._mounts.now():  # theirs is a copy of what was mounted then
            self.drop()
        while kind.ready:
            container = kind.ready.popleft()
            if not container.has_ended():
                return container
            self._discard(container)
        return None

    def kind_of(self, order: Order) -> Kind | None:
        """The kind of an order, from now on the last one asked for; None for what is never made
        ahead."""
        if not self.size or order.trial or order.uptime is not None:  # it would have begun to count
            return None
        order = dataclasses.replace(
            order,
            name="",
            hostname="",
            networks=(),
            network="nat" if order.own_network else "host",
            dns=None,
            hosts={},
            timeout=None,
        )
        files = tuple(map(_file, _paths(order)))
        for kind in self._kinds:
            if kind.order == order and kind.files == files:
                self._kinds.remove(kind)
                break
        else:
            kind = Kind(order, files)
        self._kinds.append(kind)
        while len(self._kinds) > self.size:  # for so old a one there is no room any more
            for container in self._kinds.pop(0).ready:
                self._discard(container)
        return kind

    def given(self, container: Container, kind: Kind | None) -> None:
        """A container has been given out, from here or not."""
        if kind is not None:
            self._of[container.id] = kind
            kind.alive += 1
            kind.most = max(kind.most, kind.alive)

    def gone(self, container: Container) -> None:
        """It has been taken down."""
        if (kind := self._of.pop(container.id, None)) is not None:
            kind.alive -= 1

    def wants(self) -> Kind | None:
        """The kind that one more should be begun of: as many as tests have had at once and one,
        so that it need not be begun at the worst moment. What was asked for last counts first."""
        room = self.size
        for kind in reversed(self._kinds):
            wanted = min(kind.most + 1, room)
            if len(kind.ready) < wanted:
                return kind
            room -= wanted
        return None

    def fill(self) -> None:
        """Begin one, if one is wanted. It goes on by itself."""
        kind = self.wants()
        if kind is None:
            return
        for other in self._kinds:  # the oldest first
            if sum(len(each.ready) for each in self._kinds) < self.size:
                break
            if other is not kind and other.ready:
                self._discard(other.ready.popleft())
        try:
            if not any(each.ready for each in self._kinds):
                self._mounted = self._mounts.now()
            kind.ready.append(self._begin(kind.order))
        except (NsboxError, OSError):  # it will be said to who asks for one
            self._kinds.remove(kind)

    def drop(self) -> None:
        """Take all down that nobody has asked for yet."""
        ready = [container for kind in self._kinds for container in kind.ready]
        for kind in self._kinds:
            kind.ready.clear()
        for container in ready:
            container.kill("stopped")  # together, not one after the other
        for container in ready:
            self._discard(container)


def _paths(order: Order) -> Iterator[str]:
    yield from order.layers
    yield from order.visible
    yield from order.passthrough
    for mount in (*order.mounts, *order.brought):
        if mount.src is not None:
            yield mount.src


def _file(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
