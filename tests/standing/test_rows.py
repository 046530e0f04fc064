"""The rows of the table for cgroup v2 in docs/where-it-runs.md, each in a machine of its kind."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nested import FEATURES, ON_V2, try_in

ROWS = ON_V2[os.environ["NSBOX_LANE"]]
PAGE = (Path(__file__).parent.parent.parent / "docs/where-it-runs.md").read_text()
CURES = (
    "Delegate=yes|/sys/fs/cgroup writable|--cap-add SYS_TIME|systempaths=unconfined|no block device"
)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("name", ROWS)
def test_what_works_in_it_is_what_the_table_says(name: str, place: Path) -> None:
    row = try_in(ROWS[name], place)
    assert row.text(name) in PAGE, row.text(name) + row.output
    assert "pytest_nsbox/" not in row.output, row.output
    for feature in FEATURES:
        if row.cells[feature] == "no":
            message = re.search(
                rf"^(?:ERROR|SKIPPED) test_it.py::test_{feature} - (.*)$", row.output, re.M
            )
            assert message, row.output
            said = re.search(rf"^test_it.py::test_{feature}: (.*)$", row.output, re.M)
            assert said, row.output
            assert re.search(CURES, said[1]), said[1]
