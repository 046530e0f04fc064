"""What a container stands on: its control group, and the directory on a disk that keeps what it
writes. Those of the next one can be made ahead, as they are the same for all of a kind."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.kernel import cgroup
from pytest_nsbox.kernel.cgroup import Cgroup
from pytest_nsbox.kernel.inode_flags import spread
from pytest_nsbox.kernel.mountinfo import mount_points
from pytest_nsbox.launcher import ledger
from pytest_nsbox.launcher.janitor import Janitor
from pytest_nsbox.model.limits import Limits
from pytest_nsbox.model.order import Order


@dataclass
class _Ahead:
    id: int
    order: Order
    cgroup: Cgroup | None = None
    layer: str | None = None


class Footing:
    """Makes all of a session. `layers` is the directory of the layers."""

    def __init__(self, record: ledger.Ledger, layers: Path, janitor: Janitor) -> None:
        self.cgroups: cgroup.Driver | None = None
        self.no_cgroups = ""  # why there are none
        self.layers = layers
        self._ledger = record
        self._janitor = janitor
        self._last: Order | None = None
        self._ahead: _Ahead | None = None

    def cgroup_for(self, id: int, order: Order) -> Cgroup | None:
        """None where no limit is asked for and none could be kept. Raises UnsupportedError."""
        ahead = self._ahead
        if ahead is not None and ahead.id != id:
            self.drop()
        elif ahead is not None and ahead.cgroup is not None:
            found, ahead.cgroup = ahead.cgroup, None
            if ahead.order.limits == order.limits:
                return found
            found.remove()  # it has the name that the new one is to have
        return self.make_cgroup(f"c{id}", order.limits)

    def layer_for(self, id: int, order: Order) -> str | None:
        """Where a memory limit is set, what is written must not count as memory: the pages of a
        tmpfs cannot be reclaimed, so a large file would end the container. And where block I/O is
        limited there has to be some."""
        ahead, self._ahead = self._ahead, None
        layer = None if ahead is None else ahead.layer
        self._last = None if order.trial else order
        if not self._on_disk(order):
            if layer is not None:
                self.remove_layer(layer)
            return None
        if layer is None or not os.path.isdir(layer):  # somebody has tidied up meanwhile
            return self._make_layer(id)
        return layer

    def make_ahead(self, id: int) -> None:
        """For container `id`, if it will be like the last one. What goes wrong is said when it is
        needed."""
        if self._last is None or self._ahead is not None:
            return
        self._ahead = ahead = _Ahead(id, self._last)
        with contextlib.suppress(NsboxError, OSError):
            ahead.cgroup = self.make_cgroup(f"c{id}", ahead.order.limits)
            ahead.layer = self._make_layer(id) if self._on_disk(ahead.order) else None

    def drop(self) -> None:
        """Remove what was made ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        if ahead.layer is not None:
            self.remove_layer(ahead.layer)
        if ahead.cgroup is not None:
            ahead.cgroup.remove()

    def make_cgroup(self, name: str, limits: Limits) -> Cgroup | None:
        """None where no limit is asked for and none could be kept. Raises UnsupportedError."""
        if self.cgroups is None:
            asked = [name for name, value in vars(limits).items() if value is not None]
            if asked:
                raise UnsupportedError(f"{asked[0]}= cannot be kept: {self.no_cgroups}")
            return None
        device = self._device() if limits.io is not None else None
        return self.cgroups.create(name, limits, device)

    def remove_layer(self, layer: str) -> None:
        """Have it removed, by and by."""
        self._janitor.remove(layer, self._ledger.file_of(layer))

    def _device(self) -> str:
        """The device that the layers are on, as major:minor."""
        self.layers.mkdir(parents=True, exist_ok=True)
        number = self.layers.stat().st_dev
        return f"{os.major(number)}:{os.minor(number)}"

    def _on_disk(self, order: Order) -> bool:
        limited = order.limits.memory is not None or order.limits.io is not None
        return order.disk is None and limited and _holds_layers(self.layers)

    def _make_layer(self, id: int) -> str:
        path = f"{self.layers}/{self._ledger.name}-{id}"
        self._ledger.record(ledger.LAYER, path)
        os.makedirs(path, mode=0o700)
        return path


@functools.cache
def _holds_layers(directory: Path) -> bool:
    """An overlay cannot be the upper layer of another one, as of the kernel's
    Documentation/filesystems/overlayfs.rst, and files on a tmpfs are memory wherever it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve()
    over = [mount for mount in mount_points() if path.is_relative_to(mount.path)]
    spread(path)
    return max(over, key=lambda mount: len(mount.path)).fstype not in ("overlay", "tmpfs")
