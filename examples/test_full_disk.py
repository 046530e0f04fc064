"""A program that saves its state must not lose the old one when the disk is full.
disk= makes a disk of 4 MiB; the test's body runs inside and meets a real ENOSPC."""

import errno
from pathlib import Path

import pytest

STATE = Path("/var/lib/program/state")


def save(data):
    """The code under test: a full disk leaves the old state, and no litter."""
    STATE.parent.mkdir(exist_ok=True)
    new = STATE.with_name("state.new")
    try:
        new.write_bytes(data)
        new.replace(STATE)
    except OSError:
        new.unlink(missing_ok=True)
        raise


@pytest.mark.sandbox(disk="4M")
def test_a_full_disk_leaves_the_old_state():
    save(b"old")
    with pytest.raises(OSError) as caught:
        save(bytes(8 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert STATE.read_bytes() == b"old"
    assert [path.name for path in STATE.parent.iterdir()] == ["state"]

    save(b"new, as there is room again")
    assert STATE.read_bytes() == b"new, as there is room again"
