"""Many containers, one after the other: what their processes hold does not grow."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pytest_nsbox import Session

MOST_DESCRIPTORS, MOST_KIB = 2, 1024  # how many more at the end are noise


def held(pid: int | str) -> tuple[int, int]:
    """Descriptors, and KiB of memory of its own."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+)", text)
    assert found
    return len(os.listdir(f"/proc/{pid}/fd")), int(found[1])


def go_through(number: int, warm_up: int = 60) -> tuple[list[str], bool]:
    """A table of what is held after some and after all, and whether that is the same."""
    with Session() as session:

        def use(count: int) -> dict[str, tuple[int, int]]:
            for _ in range(count):
                with session.container(memory="64M") as container:
                    container.run(["true"])
            assert session._launcher is not None
            launcher = session._launcher.pid
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            # the janitor, the last, opens a directory for each level that it removes
            names = {"test process": "self", "launcher": launcher, "zygote": children[0]}
            return {name: held(pid) for name, pid in names.items()}

        before, after = use(warm_up), use(number - warm_up)
    row = "{:26} {:>12} {:>12} {:>10} {:>10}".format
    table = [row(f"{number} containers", "descriptors", "at the end", "KiB", "at the end")]
    flat = True
    for name in before:
        (fds, kib), (fds_after, kib_after) = before[name], after[name]
        table.append(row(name, fds, fds_after, kib, kib_after))
        flat &= fds_after <= fds + MOST_DESCRIPTORS and kib_after <= kib + MOST_KIB
    return table, flat
