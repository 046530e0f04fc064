"""A few steps of each part of a session fail; `python -m tests.chaos` has every one fail."""

from __future__ import annotations

import pytest

from tests.audit import Snapshot
from tests.chaos import faults

SAMPLES = {
    faults.Begin: 2,
    faults.First: 6,
    faults.Build: 12,
    faults.ForkAhead: 12,
    faults.BuildAhead: 12,
    faults.TakeDown: 12,
    faults.TakeDownAhead: 12,
    faults.End: 3,
    faults.EndAhead: 3,
    faults.EndUnused: 3,
}


@pytest.mark.parametrize("stage", faults.STAGES, ids=lambda stage: stage.name)
def test_a_step_that_fails_is_named_and_undone(
    stage: type[faults.Stage], nothing_left: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # is put back
    tally = faults.Tally()
    faults.go_through(stage, tally, sample=SAMPLES[stage])
    assert tally.wrong == {stage.name: []}
    assert tally.tried[stage.name] >= SAMPLES[stage]
