"""How a container has ended, and what it did last, in words."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pytest_nsbox import wire
from pytest_nsbox.errors import ContainerDied, ContainerTimeout, NsboxError, OutOfMemory
from pytest_nsbox.model.spec import SandboxSpec
from pytest_nsbox.model.units import format_size
from pytest_nsbox.session.process import describe_end

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container

_NAMED = 10  # processes of a container in its summary


def reason(container: Container, patience: float) -> NsboxError | None:
    """Why it is dead; None while it lives."""
    if not container.closed:
        wire.is_ready(container.pidfd, patience)
    state = container.state()
    if state["alive"] and not container.closed:
        return None
    what = f"container {container.name!r}"
    match state["reason"]:
        case "memory":
            return OutOfMemory(f"{what} was killed: {out_of_memory(container.spec, state)}")
        case "timeout":
            return ContainerTimeout(
                f"{what} was killed: it outlived its timeout of {container.spec.timeout:g} s"
            )
        case "killed":
            return ContainerDied(f"{what} has been killed")
    if container.closed or state["reason"] == "stopped":
        return ContainerDied(f"{what} has been taken down")
    return ContainerDied(f"{what} has died: its PID 1 was killed from outside")


def out_of_memory(spec: SandboxSpec, state: wire.Message) -> str:
    """ "out of memory: limit 64 MiB, peak 63.9 MiB" """
    text = "out of memory"
    if spec.memory is not None:
        text += f": limit {format_size(spec.memory)}"
    peak = (state["stats"] or {}).get("memory_peak")
    if peak is not None:
        text += f", peak {format_size(peak)}"
    return text


def summary(container: Container) -> str:
    """Its state and the end of what ran in it."""
    death = container.settle()
    state = str(death) if death else f"{container.ip or 'no network'}, running"
    lines = [state, *map(describe_end, container.processes)]
    if container.unyielding:
        lines.append(f"SIGTERM has not ended, so SIGKILL has: {_named(container.unyielding)}")
    elif others := _others(container):
        lines.append(f"running besides: {_named(others)}")
    return "\n".join(lines)


def _others(container: Container) -> list[str]:
    """The processes that `popen` has not started, as "pid (name)", numbered as inside."""
    if container.closed:
        return []
    with contextlib.suppress(NsboxError):
        reply, _ = container.session.request("state", id=container.id, tell=True)
        known = {str(process.pid) for process in container.processes}
        return [row for row in reply.get("running", []) if row.split()[0] not in known]
    return []


def _named(rows: list[str]) -> str:
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(rows[:_NAMED]) + more
