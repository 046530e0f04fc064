"""Links that are waited for."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from pytest_nsbox.kernel import libc, link
from pytest_nsbox.kernel.namespaces import open_namespace


def in_new_network(body: Callable[[], None]) -> int:
    """Run in a child with a network namespace of its own; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            libc.unshare(libc.CLONE_NEWNET)
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def pair(both_up: bool) -> link.LinkSocket:
    netlink = link.LinkSocket()
    here = open_namespace("net")
    netlink.send([link.add_veth(10, "a", peer="b", peer_index=11, peer_netns=here)])
    if both_up:
        netlink.send([link.up(11, "b")])
    return netlink


def test_a_link_with_a_carrier_settles() -> None:
    assert in_new_network(lambda: pair(both_up=True).settle(10)) == 0


def test_a_link_without_a_carrier_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_PATIENCE", 0.1)

    def body() -> None:
        with pytest.raises(TimeoutError):
            pair(both_up=False).settle(10)

    assert in_new_network(body) == 0


def test_a_refused_request_names_the_command_and_the_error() -> None:
    def body() -> None:
        with pytest.raises(OSError, match="ip link set nothing up: No such device"):
            link.LinkSocket().send([link.up(99, "nothing")])

    assert in_new_network(body) == 0
