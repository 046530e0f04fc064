"""What a container's root filesystem is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HOST = "host"


@dataclass(frozen=True, kw_only=True)
class Rootfs:
    """A resolved root filesystem: directories to stack, and what its image says about a start."""

    source: str  # as the user wrote it
    layers: tuple[str, ...] = ()  # absolute directories, lowest first; none for the host's root
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    cwd: str | None = None
    user: str | None = None
    command: tuple[str, ...] = ()  # Entrypoint and Cmd

    @property
    def is_host(self) -> bool:
        return not self.layers

    def to_wire(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "source": self.source,
            "layers": list(self.layers),
            "env": dict(self.env),
            "cwd": self.cwd,
            "user": self.user,
            "command": list(self.command),
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
        )
