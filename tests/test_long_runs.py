"""A session that lives long, or has much to take down at once."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack
from pathlib import Path

from pytest_nsbox import Session
from tests.audit import Snapshot


def held(pid: int | str) -> tuple[int, int]:
    """Descriptors, and KiB of memory of its own."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+)", text)
    assert found
    return len(os.listdir(f"/proc/{pid}/fd")), int(found[1])


def test_many_containers_one_after_the_other_leave_memory_and_descriptors_flat(
    nothing_left: Snapshot,
) -> None:
    with Session() as session:

        def use(count: int) -> list[tuple[int, int]]:
            for _ in range(count):
                with session.container(memory="64M") as container:
                    container.run(["true"])
            assert session._launcher is not None
            launcher = session._launcher.pid
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            # the janitor, the last, opens a directory for each level that it removes
            return [held(pid) for pid in ("self", launcher, *children[:1])]

        for before, after in zip(use(60), use(120), strict=True):
            assert after[0] <= before[0] + 2
            assert after[1] <= before[1] + 1024


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
