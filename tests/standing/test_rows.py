"""Rows of the tables in docs/where-it-runs.md that take a machine of their kind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nested import LANES, PAGE, try_in

ROWS = LANES[os.environ["NSBOX_LANE"]]


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("name", ROWS)
def test_what_works_in_it_is_what_the_table_says(name: str, place: Path) -> None:
    row = try_in(ROWS[name], place)
    assert row.text(name) in PAGE, row.text(name) + row.output
    assert "pytest_nsbox/" not in row.output, row.output
    assert [*row.unexplained()] == [], row.output
