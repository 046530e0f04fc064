"""Removes what dead launchers have left: python -m pytest_nsbox.launcher.sweep CACHE."""

from __future__ import annotations

import sys
from pathlib import Path

from pytest_nsbox.launcher import ledger
from pytest_nsbox.launcher.standing import take_standing

if __name__ == "__main__":
    state = ledger.state_directory()
    take_standing()  # what containers have written may be another's than the user's
    ledger.sweep_all(state, Path(sys.argv[1]))
