"""What a container may use, and what it has used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one control group; None means no limit of its own (cgroups(7))."""

    cpus: float | None = None  # cores, as CPU bandwidth
    cpuset: str | None = None  # a list of cores as in cpuset(7), "0,2-3"
    memory: int | None = None  # bytes
    swap: int | None = None  # bytes of swap beyond `memory`
    pids: int | None = None  # processes and threads
    io: Mapping[str, int] | None = None  # rbps, wbps (bytes/s), riops, wiops (operations/s)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a container has used so far.

    Times are in seconds, sizes in bytes. A field is None where the kernel does not count it.
    """

    cpu: float  # time on a CPU, user and system
    throttled: float | None  # time spent waiting because of `cpus`
    memory: int  # in use now
    memory_peak: int | None  # the most ever in use
    memory_limit: int | None
    pids: int  # processes and threads alive now
    oom_kills: int  # processes killed for want of memory
