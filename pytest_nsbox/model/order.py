"""What the launcher is asked to build: a spec with every choice made, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytest_nsbox.model.limits import Limits


@dataclass(frozen=True, kw_only=True)
class MountOrder:
    """A mount that the user asked for: a bind where `src` is given, else a tmpfs."""

    dst: str
    src: str | None = None
    read_only: bool = True
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """One container, ready to be built. It crosses the wire as JSON."""

    name: str
    hostname: str
    layers: tuple[str, ...] = ()  # lowest first; empty: the host's own root
    frozen: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of a Rootfs
    by_directory: bool = False
    limits: Limits = field(default_factory=Limits)
    disk: int | None = None
    network: str = "nat"  # nat, isolated, none, host: only where `networks` is empty
    networks: tuple[int, ...] = ()
    dns: tuple[str, ...] | None = None
    hosts: dict[str, str] = field(default_factory=dict)
    mounts: tuple[MountOrder, ...] = ()
    read_only: bool = False
    sysctls: dict[str, str] = field(default_factory=dict)
    uptime: float | None = None
    userns: bool = False
    capabilities: tuple[str, ...] = ()  # those kept
    privileged: bool = False
    timeout: float | None = None
    passthrough: tuple[str, ...] = ()  # paths of the host shown as they are, writable
    visible: tuple[str, ...] = ()  # paths of the host to show even where /tmp or /run hides them
    brought: tuple[MountOrder, ...] = ()  # what a body needs of the host on an image, read-only
    trial: bool = False  # only to see whether it can be made: no second one will be asked for

    @property
    def own_network(self) -> bool:
        """Whether it has a network namespace of its own."""
        return bool(self.networks) or self.network != "host"

    def to_wire(self) -> dict[str, Any]:
        data = dict(vars(self))  # dataclasses.asdict copies all the way down
        data["limits"] = vars(self.limits)
        for name in ("mounts", "brought"):
            data[name] = [vars(mount) for mount in data[name]]
        return data

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Order:
        data = dict(data)
        data["limits"] = Limits(**data["limits"])
        for name in ("mounts", "brought"):
            data[name] = tuple(MountOrder(**mount) for mount in data[name])
        data["frozen"] = {path: tuple(value) for path, value in data["frozen"].items()}
        for name, value in data.items():
            if isinstance(value, list):
                data[name] = tuple(value)
        return cls(**data)
