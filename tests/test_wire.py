"""Messages and the descriptors beside them."""

from __future__ import annotations

import os
import socket

import pytest

from pytest_nsbox import wire
from pytest_nsbox.launcher.zygote import last_word


def test_descriptors_that_arrive_are_not_handed_on_to_programs() -> None:
    here, there = wire.pair()
    with here, there:
        wire.send(here, {"op": "x"}, [0, 1, 2])
        received = wire.receive(there)
    assert received is not None
    message, fds = received
    assert (message, len(fds)) == ({"op": "x"}, 3)
    assert not any(map(os.get_inheritable, fds))
    wire.close_all(fds)


def test_who_will_not_wait_for_a_message_does_not() -> None:
    here, there = wire.pair()
    with here, there, pytest.raises(BlockingIOError):
        wire.receive(there, flags=socket.MSG_DONTWAIT)


def test_the_last_word_of_an_init_is_heard_also_if_its_order_was_not_read() -> None:
    launcher, init = wire.pair()
    with launcher:
        with init:
            wire.send(launcher, {"steps": []})
            wire.send(init, {"op": "apart"})
            wire.send(init, {"error": {"text": "mount proc on /proc"}})
        assert last_word(launcher) == {"text": "mount proc on /proc"}
