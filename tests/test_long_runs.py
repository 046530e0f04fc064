"""A session that lives long, or has much to take down at once."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

from pytest_nsbox import Session
from tests.audit import Snapshot
from tests.chaos import long


def test_many_containers_one_after_the_other_leave_memory_and_descriptors_flat(
    nothing_left: Snapshot,
) -> None:
    table, flat = long.go_through(180)
    assert flat, table


def test_two_hundred_alive_at_once_are_taken_down_in_five_seconds(nothing_left: Snapshot) -> None:
    session = Session()
    with ExitStack() as stack:
        for _ in range(200):
            container = session.container()
            stack.callback(os.close, container.pidfd)
            stack.callback(container._init.close)
        begin = time.monotonic()
        session.close()
        took = time.monotonic() - begin
    assert took < 5 * (4 if os.environ.get("RUN_IN_V2") else 1), took
