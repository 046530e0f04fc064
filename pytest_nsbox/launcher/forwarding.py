"""Whether the host's firewall lets containers' packets through, found by sending one.

A base chain that drops cannot be overruled by one that accepts in another table, and where rules
are many (Docker, firewalld, ufw, iptables of either kind) only the kernel knows what they come to.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time

from pytest_nsbox.kernel import link, nft
from pytest_nsbox.launcher.uplink import Host

CURE = (
    "have its firewall accept what is forwarded for nsbox* (iptables -I FORWARD -i nsbox+ -j "
    "ACCEPT, and the same with -o; beside Docker in chain DOCKER-USER), or use "
    "network='isolated', or --nsbox-uplink=none for all tests"
)
_PRIORITY = nft.PRIORITY_SRCNAT - 1  # before NAT, which may end the way through the chains
_PATIENCE = 0.3  # seconds; a packet is through before send(2) returns, unless the machine is busy
_NOWHERE = ("192.0.2.1", "198.51.100.1", "203.0.113.1")  # RFC 5737


def refusal(host: Host, source: str) -> str | None:
    """Why a packet from `source`, the hub's address, is not forwarded; None when it is.

    The packet does not leave the host: the last hook that it passes counts it and drops it. The
    caller is in the hub.
    """
    out = link.default_route_device(host.netlink)
    target = next((ip for ip in _NOWHERE if link.route_device(host.netlink, ip) == out), None)
    if out is None or target is None:
        return None  # the host has no way out itself
    # a table has one owner, and others may probe at this moment
    table = f"nsbox-probe-{os.urandom(4).hex()}"
    with host.entered():
        rules = nft.Nft()
    try:
        rules.commit(
            nft.table(table),
            nft.chain(table, "passed", "filter", "postrouting", _PRIORITY),
            nft.rule(
                table, "passed", nft.source(source), nft.destination(target), nft.counted_drop()
            ),
        )
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.connect_ex((target, 443))
            if _arrives(rules, table, sock):
                return None
    finally:
        rules.close()
    return f"this host does not forward packets of containers: {_culprit(host)}"


def _arrives(rules: nft.Nft, table: str, sock: socket.socket) -> bool:
    deadline = time.monotonic() + _PATIENCE
    poll = select.poll()
    poll.register(sock, 0)  # an error is reported in any case: a firewall's refusal
    while not rules.packets(table, "passed"):
        if poll.poll(5) or time.monotonic() > deadline:
            return False
    return True


def _culprit(host: Host) -> str:
    with host.entered():
        found = [name for name, policy in nft.forward_chains() if policy == nft.DROP]
    if found:
        return f"the policy of chain {found[0]} is to drop (Docker sets it so)"
    return "a rule of its firewall refuses them"
