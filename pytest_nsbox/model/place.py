"""Where in a container something can be written, and which directory keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Place:
    """One part of a container's file tree.

    `kind` is `overlay`; `plain`, for a directory that starts empty; or `made`, for one in which
    stand the mount points and symbolic links of the host's root, without an overlay of its own.
    """

    target: str  # in the container
    upper: str  # below the scratch filesystem, or on the host where `on_disk`
    on_disk: bool
    lower: tuple[str, ...] = ()  # on the host, topmost first
    user: bool = False  # the overlay's marks are user.* attributes
    kind: Literal["overlay", "plain", "made"] = "overlay"

    def to_wire(self) -> list[Any]:
        return list(dataclasses.astuple(self))

    @classmethod
    def from_wire(cls, row: Sequence[Any]) -> Place:
        names = [field.name for field in dataclasses.fields(cls)]
        data = dict(zip(names, row, strict=True))
        data["lower"] = tuple(data["lower"])
        return cls(**data)
