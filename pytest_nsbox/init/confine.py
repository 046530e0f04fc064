"""What the processes of a container may not do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pytest_nsbox.kernel import capabilities, seccomp


@dataclass(frozen=True)
class Confinement:
    """The capabilities kept (capabilities(7)) and the system call filter (seccomp(2))."""

    capabilities: frozenset[str]
    filter: bytes | None

    def prepare(self) -> None:
        """Look up what `apply` needs, once for all processes forked later."""
        capabilities.split(self.capabilities)
        if self.filter is not None:
            seccomp.prepare(self.filter)

    def apply(self) -> None:
        """Confine the calling process and all that it will start. There is no way back."""
        capabilities.drop_to(self.capabilities)
        capabilities.no_new_privs()
        if self.filter is not None:
            seccomp.install(self.filter)


@functools.cache
def confinement(keep: frozenset[str]) -> Confinement:
    """What goes with keeping these capabilities."""
    return Confinement(keep, seccomp.program(keep))
