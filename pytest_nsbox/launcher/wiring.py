"""A container and its networks: a cable to each, and addresses.

One that is ordered as it is built connects itself, before it is confined, while the launcher makes
its file tree; one that was built ahead is connected by the launcher, which pays it a visit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from pytest_nsbox import wire
from pytest_nsbox.init.setup import BATCH
from pytest_nsbox.kernel import link
from pytest_nsbox.kernel.namespaces import open_namespace
from pytest_nsbox.kernel.netlink import Batch, Netlink, Request
from pytest_nsbox.launcher.container import Container
from pytest_nsbox.launcher.hub import Interface

Joiner = Callable[[], Interface]
MOST_AT_ONCE = 16  # networks: the kernel's answers wait in a socket that has room for some hundred
_FIRST_INTERFACE = 2  # lo is 1 in every network namespace


def join(container: Container, joiners: Iterable[Joiner]) -> None:
    """Give it an address on each of its networks."""
    for joiner in joiners:
        interface = joiner()
        container.interfaces.append(interface)
        container.undo.push(f"give back {interface.ip}", interface.leave)


def have_connected(container: Container) -> None:
    """Have init connect itself with its networks, which it can while its file tree is built."""
    container.connected = True
    if not container.order.own_network:
        return
    for interface in container.interfaces:  # of one that came to nothing there are answers left
        interface.bridge.hub.netlink.forget()
    for number, interface in enumerate(container.interfaces):
        netlink = interface.bridge.hub.netlink
        batch = netlink.batch(interface.wire(f"eth{number}", _FIRST_INTERFACE + number, None))
        container.asked.append((netlink, batch))
        _tell(container, BATCH + batch.data, [netlink.fileno()])
    batch = Batch.of(_inside_requests(container))
    container.asked.append((None, batch))
    _tell(container, BATCH + batch.data, [])


def confirm(container: Container, fds: list[int]) -> None:
    """That all that init has asked the kernel for was done; `fds` are from init."""
    asked, container.asked = container.asked, []
    if not asked:
        return
    with contextlib.closing(Netlink.adopt(fds.pop(0))) as own:
        for netlink, batch in asked:
            (netlink or own).confirm(batch)


def connect(container: Container) -> None:
    """Connect it from within its network namespace, where the caller is."""
    netns = open_namespace("net")
    try:
        for number, interface in enumerate(container.interfaces):
            hub = interface.bridge.hub
            hub.netlink.send(interface.wire(f"eth{number}", _FIRST_INTERFACE + number, netns))
        with contextlib.closing(Netlink()) as netlink:
            netlink.send(_inside_requests(container))
    finally:
        os.close(netns)


def _inside_requests(container: Container) -> list[Request]:
    requests = [link.up(link.LOOPBACK, "lo")]
    first_out = next(
        (i for i in container.interfaces if i.bridge.hub.internet),
        container.interfaces[0] if container.interfaces else None,
    )
    for number, interface in enumerate(container.interfaces):
        requests += interface.configure(
            f"eth{number}", _FIRST_INTERFACE + number, gateway=interface is first_out
        )
    return requests


def _tell(container: Container, payload: bytes, fds: Iterable[int]) -> None:
    """Send init something. Why it has ended, if it has, is said when it is listened to."""
    assert container.init is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send_bytes(container.init, payload, fds)
