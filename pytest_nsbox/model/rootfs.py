"""What a container's root filesystem is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HOST = "host"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # if an image names none


@dataclass(frozen=True, kw_only=True)
class Rootfs:
    """A resolved root filesystem: directories to stack, and what its image says about a start."""

    source: str  # as the user wrote it
    layers: tuple[str, ...] = ()  # absolute directories, lowest first; none for the host's root
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    cwd: str | None = None
    user: str | None = None
    command: tuple[str, ...] = ()  # Entrypoint and Cmd
    # of a snapshot: a path in the container, and what is stacked there upon the layers or the
    # host's own, lowest first
    frozen: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    by_directory: bool = False  # a snapshot of the host's root in a user namespace

    @property
    def is_host(self) -> bool:
        return not self.layers

    @property
    def stack(self) -> tuple[str, ...]:
        """The directories that make up its root, those of a snapshot with them."""
        return (*self.layers, *self.frozen.get("/", ()))

    def to_wire(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "source": self.source,
            "layers": list(self.layers),
            "env": dict(self.env),
            "cwd": self.cwd,
            "user": self.user,
            "command": list(self.command),
            "frozen": {path: list(directories) for path, directories in self.frozen.items()},
            "by_directory": self.by_directory,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Rootfs:
        """The inverse of `to_wire`."""
        return cls(
            source=wire["source"],
            layers=tuple(wire["layers"]),
            env=dict(wire["env"]),
            cwd=wire["cwd"],
            user=wire["user"],
            command=tuple(wire["command"]),
            frozen={path: tuple(directories) for path, directories in wire["frozen"].items()},
            by_directory=wire["by_directory"],
        )
