"""Processes as /proc shows them (proc_pid_stat(5))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One process, told apart from a later one of the same number by its start."""

    pid: int
    name: str
    state: str  # one letter: R, S, D, T, Z
    parent: int
    start: int  # clock ticks since boot


def find(pid: int) -> Process | None:
    """The process with this number; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            before, _, after = file.read().rpartition(b")")
    except OSError:
        return None
    fields = after.split()
    name = before.partition(b"(")[2].decode(errors="replace")
    return Process(pid, name, fields[0].decode(), int(fields[1]), int(fields[19]))


def all_of_them() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := find(int(name))) is not None:
            yield process


def variables(pid: int) -> list[str]:
    """The environment that it was started with; empty where that may not be read."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().decode(errors="replace").split("\0")
    return []


def describe(pids: Iterable[int]) -> str:
    """Who does not end, and where in the kernel it is."""
    words = []
    for pid in sorted(pids):
        process = find(pid)
        if process is None:
            continue
        where = ""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/wchan", encoding="ascii") as file:
            where = file.read().strip("0")
        words.append(f"{pid} ({process.name}) in state {process.state}" + (where and f", {where}"))
    return "; ".join(words) or "nobody that is still to be seen"
