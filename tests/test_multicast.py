"""What is sent to a group reaches all who have joined; a new container has nothing to say."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable

import pytest

from pytest_nsbox import Container, Process

Factory = Callable[..., Container]

# prints the source of every packet that comes, and what ICMPv6 message it is, until the last one
WATCH = """
import socket
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("ready", flush=True)
while True:
    packet, (_, _, kind, _, _) = sock.recvfrom(2048)
    if kind == socket.PACKET_OUTGOING:
        continue
    after_options = packet[62:] if packet[20] == 0 else packet[54:]
    print(packet[6:12].hex(":"), after_options[0] if packet[12:14] == b"\\x86\\xdd" else "ipv4")
    if b"the last one" in packet:
        break
"""
JOIN = """
import socket, sys
group = sys.argv[1]
family = socket.AF_INET6 if ":" in group else socket.AF_INET
sock = socket.socket(family, socket.SOCK_DGRAM)
sock.bind(("", 5000))
if family == socket.AF_INET6:
    member = socket.inet_pton(family, group) + socket.if_nametoindex("eth0").to_bytes(4, "little")
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
else:
    member = socket.inet_aton(group) + socket.inet_aton("0.0.0.0")
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
print("ready", flush=True)
print(sock.recv(100).decode(), flush=True)
"""
MLD2_REPORT = "143"


def send(group: str, text: str) -> None:
    family = socket.AF_INET6 if ":" in group else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        interface = socket.if_nametoindex("eth0")
        sock.sendto(
            text.encode(),
            (group, 5000, 0, interface) if family == socket.AF_INET6 else (group, 5000),
        )


def start(container: Container, script: str, *args: str) -> Process:
    process = container.popen([sys.executable, "-c", script, *args])
    container.wait_for_log("ready", process=process)
    return process


def sent(container: Container, what: str) -> int:
    """How many ICMPv6 messages it has sent (snmp6)."""
    counters = container.read_text("/proc/net/snmp6")
    return int(dict(line.split() for line in counters.splitlines())[what])


def seen(watcher: Process, sender: Container) -> list[str]:
    """What came before the last one."""
    watcher.wait(30)
    mac = sender.read_text("/sys/class/net/eth0/address").strip()
    lines = watcher.log().splitlines()[1:-1]
    return [line.split()[1] for line in lines if line.startswith(mac)]


def test_a_new_container_sends_its_neighbours_nothing(nsbox_container_factory: Factory) -> None:
    neighbour = nsbox_container_factory("neighbour")
    watcher = start(neighbour, WATCH)
    new = nsbox_container_factory("new")
    # the kernel sends two of these at once and two within seconds
    new.wait_until(lambda: sent(new, "Icmp6OutMLDv2Reports") >= 3)
    new.call(send, "ff02::1", "the last one")
    assert seen(watcher, new) == []
    assert sent(new, "Icmp6OutRouterSolicits") == sent(new, "Icmp6OutNeighborSolicits") == 0


def test_all_addresses_of_a_new_container_can_be_used(nsbox_container: Container) -> None:
    addresses = nsbox_container.run(["ip", "-6", "address", "show", "eth0"], check=True).stdout
    assert len(re.findall("scope link", addresses)) == 1
    assert "tentative" not in addresses


def test_a_neighbour_sees_which_groups_are_joined(nsbox_container_factory: Factory) -> None:
    """As a router of multicast packets has to."""
    neighbour, member = nsbox_container_factory("neighbour"), nsbox_container_factory("member")
    watcher = start(neighbour, WATCH)
    start(member, JOIN, "ff05::1234")
    before = sent(member, "Icmp6OutMLDv2Reports")
    member.wait_until(lambda: sent(member, "Icmp6OutMLDv2Reports") > before)
    member.call(send, "ff02::1", "the last one")
    assert MLD2_REPORT in seen(watcher, member)


@pytest.mark.parametrize(
    "group", ["224.0.0.251", "239.255.255.250", "ff02::fb", "ff02::1", "ff05::c"]
)
def test_what_is_sent_to_a_group_reaches_every_member(
    nsbox_container_factory: Factory, group: str
) -> None:
    members = [nsbox_container_factory(name) for name in "ab"]
    sender = nsbox_container_factory("c")
    listeners = [start(member, JOIN, group) for member in members]
    sender.call(send, group, "to all of you")
    for listener in listeners:
        assert listener.wait(30) == 0
        assert "to all of you" in listener.log()
