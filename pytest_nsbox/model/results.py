"""What comes back from a container."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a command has used (getrusage(2)); seconds and bytes."""

    cpu: float
    wall: float
    peak_memory: int


class Result(subprocess.CompletedProcess[Any]):
    """How a command ended: a `subprocess.CompletedProcess` that knows a little more.

    `signal` is what killed it, or None; `oom_killed` whether the container was killed for going
    over its `memory`; `usage` the time and memory it took.
    """

    def __init__(
        self,
        args: Any,
        returncode: int,
        stdout: Any = None,
        stderr: Any = None,
        *,
        oom_killed: bool = False,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(args, returncode, stdout, stderr)
        self.oom_killed = oom_killed
        self.usage = usage

    @property
    def signal(self) -> signal.Signals | None:
        return signal.Signals(-self.returncode) if self.returncode < 0 else None


@dataclass(frozen=True)
class Change:
    """One path that a container has changed against its root filesystem."""

    path: str
    kind: Literal["added", "changed", "deleted"]
