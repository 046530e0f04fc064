"""Ending politely, and waiting for what has ended."""

from __future__ import annotations

import time

import pytest

from pytest_nsbox import Container, ContainerDied, WaitError


def test_stop_lets_every_process_end_by_itself(nsbox_container: Container) -> None:
    box = nsbox_container
    polite = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 1000 & wait; done"
    first = box.popen(["sh", "-c", polite])
    second = box.popen(["sleep", "1000"])
    orphan = "(setsid sh -c 'trap \"echo gone; exit\" TERM; echo up; sleep 1000 & wait' &)"
    third = box.popen(orphan, shell=True)
    box.wait_for_log("up", process=first)
    box.wait_until(lambda: "up" in third.log())
    box.stop(timeout=30)
    assert (first.wait(), first.log()) == (3, "up\nbye\n")
    assert second.wait() == -15
    assert third.log() == "up\ngone\n"
    assert isinstance(box.death(), ContainerDied)
    assert box.stats().cpu > 0
    with pytest.raises(ContainerDied, match="taken down"):
        box.run(["true"])


def test_stop_kills_what_does_not_listen(nsbox_container: Container) -> None:
    deaf = nsbox_container.popen(["sh", "-c", "trap '' TERM; echo up; sleep 1000; sleep 1000"])
    nsbox_container.wait_for_log("up", process=deaf)
    nsbox_container.stop(timeout=0.2)
    assert deaf.wait() == -9
    nsbox_container.stop()  # a second time does nothing


def test_stop_of_a_container_in_which_nothing_runs(nsbox_container: Container) -> None:
    begin = time.monotonic()
    nsbox_container.stop(timeout=30)
    assert time.monotonic() - begin < 10
    assert nsbox_container.death() is not None


def test_a_wait_for_a_condition_fails_at_once_with_its_process(
    nsbox_container: Container,
) -> None:
    process = nsbox_container.popen(["sh", "-c", "echo the reason; exit 4"])
    with pytest.raises(WaitError, match=r"(?s)status 4.*the reason"):
        nsbox_container.wait_until(lambda: False, process=process, timeout=60)
    slow = nsbox_container.popen(["sh", "-c", "echo so far; sleep 1000"])
    nsbox_container.wait_for_log("so far", process=slow)
    with pytest.raises(WaitError, match=r"(?s)within 0.01 s; .*is running.*so far"):
        nsbox_container.wait_until(lambda: False, process=slow, timeout=0.01)
