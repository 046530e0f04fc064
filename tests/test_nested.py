"""Where it runs: what works is what the tables say, and the rest is said before, with the cure."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.audit import Snapshot
from tests.nested import ENVIRONMENTS, HEADS, LANES, PAGE, STAND_INS, head, try_in

BY_NAME = {**ENVIRONMENTS, **{name: engine.run for name, engine in STAND_INS.items()}}


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("title", sorted(set(HEADS.values())))
def test_a_table_has_a_row_for_each_environment_and_no_other(title: str) -> None:
    lanes = [lane for lane in LANES if HEADS[lane] == title]
    line = "\n".join(head(lanes[0]))
    assert line in PAGE
    table = PAGE.split(line)[1].split("\n\n")[0]
    rows = [name for lane in lanes for name in LANES[lane]]
    assert sorted(re.findall(r"^\| (.*?) \|", table, re.M)) == sorted(rows)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_works_in_it_is_what_the_table_says(
    name: str, place: Path, nothing_left: Snapshot
) -> None:
    row = try_in(BY_NAME[name], place)
    assert row.text(name) in PAGE, row.text(name) + row.output
    assert "pytest_nsbox/" not in row.output, row.output
    assert [*row.unexplained()] == [], row.output
