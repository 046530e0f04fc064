"""What a test does to its container by mistake does not reach the host."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_nsbox import Container, SpecError
from pytest_nsbox.model.spec import SandboxSpec

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
COVERED = "/proc/timer_list"  # by /dev/null
BACKLOG = "net/core/somaxconn"


def nodes() -> dict[str, tuple[int, ...]]:
    found = {name: os.stat(f"/dev/{name}") for name in DEVICES}
    return {
        name: (node.st_mode, node.st_uid, node.st_gid, node.st_mtime_ns)
        for name, node in found.items()
    }


@pytest.fixture
def put_back() -> Iterator[None]:
    """Other programs need them."""
    before = nodes()
    yield
    for name, (mode, uid, gid, mtime) in before.items():
        if nodes()[name] != before[name]:
            os.chown(f"/dev/{name}", uid, gid)
            os.chmod(f"/dev/{name}", mode & 0o7777)
            os.utime(f"/dev/{name}", ns=(mtime, mtime))


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("userns", [False, True])
def test_a_device_spoilt_inside_is_whole_outside(
    nsbox_container_factory: Any, userns: bool
) -> None:
    before = nodes()
    container = nsbox_container_factory(userns=userns)
    paths = [*(f"/dev/{name}" for name in DEVICES), COVERED]
    spoil = 'for path; do chmod 0 "$path"; chown 5:5 "$path"; touch -d @5 "$path"; done; exit 0'
    container.run(["sh", "-c", spoil, "sh", *paths], check=True)
    assert nodes() == before


@pytest.mark.parametrize("userns", [False, True])
def test_devices_work_and_have_the_owners_and_modes_of_the_hosts(
    nsbox_container_factory: Any, userns: bool
) -> None:
    container: Container = nsbox_container_factory(userns=userns)
    found = container.run(["stat", "-c", "%f %u %g", *(f"/dev/{name}" for name in DEVICES)])
    rows = [f"{mode:x} {uid} {gid}" for mode, uid, gid, _ in nodes().values()]
    assert found.stdout.splitlines() == rows
    script = "echo gone >/dev/null; echo full >/dev/full; head -c 3 /dev/zero /dev/urandom | wc -c"
    done = container.run(["sh", "-c", script])
    assert re.search("No space left|I/O error", done.stderr)
    assert int(done.stdout) > 6


def test_a_container_on_the_hosts_network_does_not_change_it(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(network="host")
    refused = container.run(["ip", "link", "add", "nsbox-mistake", "type", "dummy"])
    assert "not permitted" in refused.stderr
    with open(f"/proc/sys/{BACKLOG}") as file:
        value = file.read()
    write = f"echo {value.strip()} >/proc/sys/{BACKLOG}"
    assert "Read-only" in container.run(["sh", "-c", write]).stderr


def test_it_may_where_that_is_asked_for(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(network="host", capabilities=["+NET_ADMIN"])
    kept = int(container.read_text("/proc/self/status").partition("CapBnd:")[2].split()[0], 16)
    assert kept >> 12 & 1


def test_a_sysctl_of_the_hosts_network_cannot_be_ordered() -> None:
    with pytest.raises(SpecError, match=r"network='host' net.core.somaxconn is the host's"):
        SandboxSpec.make(network="host", sysctls={"net.core.somaxconn": 7})
    SandboxSpec.make(network="host", sysctls={"kernel.msgmax": 8192})
