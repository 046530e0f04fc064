"""A user to whom nothing is delegated, without subordinate ids, on cgroup v2: run by ci/v2."""

from __future__ import annotations

import os

import pytest

from pytest_nsbox import Session, UnsupportedError


def test_what_was_found_is_said_in_one_line(nsbox_session: Session) -> None:
    found = nsbox_session.describe()
    assert found.startswith("rootless, with one id only; no limits: the cgroup ")
    assert found.endswith("uplink pasta")


def test_a_limit_is_refused_with_reason_and_cure(nsbox_session: Session) -> None:
    message = "memory= cannot be kept: the cgroup .* may not be divided.*Delegate=yes"
    with pytest.raises(UnsupportedError, match=message), nsbox_session.container(memory="64M"):
        pass


@pytest.mark.sandbox
def test_all_but_limits_works() -> None:
    os.remove("/etc/passwd")
    assert os.getuid() == 0
