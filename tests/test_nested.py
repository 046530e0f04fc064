"""Inside other containers: what works there is what the table says, and the rest is said why."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.audit import Snapshot
from tests.nested import ENVIRONMENTS, FEATURES, HEAD_V2, ON_V2, head, try_in

PAGE = (Path(__file__).parent.parent / "docs/where-it-runs.md").read_text()
CURES = {
    "memory": "writable /sys/fs/cgroup|/sys/fs/cgroup writable",
    "uptime": "--cap-add SYS_TIME",
    "userns": "--security-opt systempaths=unconfined",
}


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


def test_the_table_has_a_row_for_each_environment_and_no_other() -> None:
    assert "\n".join(head()) in PAGE
    table = PAGE.split("\n".join(head()))[1].split("\n\n")[0]
    assert re.findall(r"^\| (.*?) \|", table, re.M) == list(ENVIRONMENTS)


def test_the_table_of_cgroup_v2_has_the_rows_that_ci_v2_tries() -> None:
    assert "\n".join(head(HEAD_V2)) in PAGE
    table = PAGE.split("\n".join(head(HEAD_V2)))[1].split("\n\n")[0]
    rows = [name for environments in ON_V2.values() for name in environments]
    assert sorted(re.findall(r"^\| (.*?) \|", table, re.M)) == sorted(rows)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_works_in_it_is_what_the_table_says(
    name: str, place: Path, nothing_left: Snapshot
) -> None:
    row = try_in(ENVIRONMENTS[name], place)
    assert row.text(name) in PAGE, row.output
    assert "pytest_nsbox/" not in row.output, row.output
    if "works" not in row.cells.values():
        assert "docker run --privileged" in row.output
        return
    for feature in FEATURES:
        if row.cells[feature] == "no":
            message = re.search(rf"^test_it.py::test_{feature}: (.*)$", row.output, re.M)
            assert message, row.output
            assert message[1].startswith(f"{feature}="), message[1]
            assert re.search(CURES.get(feature, CURES["memory"]), message[1]), message[1]
