"""From what a user asked for to what the launcher is told to build."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pytest_nsbox.model import capabilities
from pytest_nsbox.model.order import MountOrder, Order
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.model.spec import Bind, SandboxSpec, Tmpfs
from pytest_nsbox.model.units import parse_size

if TYPE_CHECKING:
    from pytest_nsbox.session.python import Brought


def make_order(
    spec: SandboxSpec,
    name: str,
    rootfs: Rootfs,
    passthrough: Iterable[str],
    visible: Iterable[str],
    brought: Brought | None = None,
    *,
    trial: bool = False,
) -> Order:
    """The order for one container; what is `visible` is there by no symbolic link."""
    passthrough = tuple(os.path.realpath(path) for path in passthrough)
    kept = capabilities.resolve(spec.capabilities, own_network=spec.own_network)
    return Order(
        name=name,
        hostname=spec.hostname or name,
        layers=(*([brought.layer] if brought else []), *rootfs.layers),
        frozen=dict(rootfs.frozen),
        by_directory=rootfs.by_directory,
        limits=spec.limits(),
        disk=spec.disk,
        network=spec.network,
        networks=tuple(network.id for network in spec.networks or ()),
        dns=spec.dns,
        hosts=dict(spec.hosts),
        mounts=tuple(map(_mount, spec.mounts)),
        read_only=spec.read_only,
        sysctls=dict(spec.sysctls),
        uptime=spec.uptime,
        userns=spec.userns,
        capabilities=tuple(sorted(kept)),
        privileged=spec.privileged,
        timeout=spec.timeout,
        passthrough=passthrough,
        visible=tuple(visible),
        brought=tuple(
            mount
            for mount in (brought.mounts if brought else ())
            if not any(within(mount.dst, path) for path in passthrough)
        ),
        trial=trial,
    )


def _mount(mount: Bind | Tmpfs) -> MountOrder:
    if isinstance(mount, Bind):
        return MountOrder(
            dst=os.fspath(mount.dst), src=os.path.realpath(mount.src), read_only=mount.read_only
        )
    size = None if mount.size is None else parse_size(mount.size)
    return MountOrder(dst=os.fspath(mount.dst), size=size)


def within(path: str, top: str) -> bool:
    """Whether a path is another one, or below it."""
    return path == top or path.startswith(top.rstrip("/") + "/")
