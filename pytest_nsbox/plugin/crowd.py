"""Whether the containers of a run may together ask for more memory than the machine has.

Limits are no reservations; but where there is less than all of them together, the kernel will have
to kill something that no limit is to blame for. It is told in the summary of warnings, and is no
error where warnings are.
"""

from __future__ import annotations

import contextlib
import os

import pytest

from pytest_nsbox.errors import NsboxError
from pytest_nsbox.model.units import format_size
from pytest_nsbox.plugin.specs import defaults, keywords
from pytest_nsbox.plugin.telling import is_first_worker, tell, workers
from pytest_nsbox.session.session import Session

_TOLD = pytest.StashKey[bool]()


def warn_of_crowd(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After collection: of the largest container of each worker at once."""
    if not is_first_worker(config):  # all have collected the same
        return
    largest = max((_memory(item) for item in items), default=0)
    _warn(config, largest, f"{workers(config)} at once with memory={format_size(largest)} each")


def warn_of_sum(config: pytest.Config, session: Session) -> None:
    """While a test runs: of several containers of one worker, each worker having as many."""
    limits = session.memory_limits()
    if len(limits) > 1 and not config.stash.get(_TOLD, False):
        what = f"{len(limits)} containers at once with memory={format_size(sum(limits))} together"
        if workers(config) > 1:
            what += f", in each of {workers(config)} workers,"
        config.stash[_TOLD] = _warn(config, sum(limits), what)


def _warn(config: pytest.Config, memory: int, what: str) -> bool:
    count = workers(config)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count * memory <= there:
        return False
    tell(
        config,
        f"{what} may use more than the {format_size(there)} of this "
        "machine; take fewer workers (-n) or less memory=",
    )
    return True


def _memory(item: pytest.Item) -> int:
    with contextlib.suppress(NsboxError):
        return defaults(item.config).replace(**keywords(item)).memory or 0
    return 0
