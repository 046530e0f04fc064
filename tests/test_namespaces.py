"""A container has namespaces of its own (namespaces(7))."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Container

ALWAYS = ("cgroup", "ipc", "mnt", "net", "pid", "uts")


def namespaces_of(container: Container) -> dict[str, str]:
    kinds = [*ALWAYS, "time", "user"]
    links = container.run(["readlink", *(f"/proc/self/ns/{kind}" for kind in kinds)], check=True)
    return dict(zip(kinds, links.stdout.split(), strict=True))


def test_every_namespace_differs_from_the_hosts(nsbox_container: Container) -> None:
    inside = namespaces_of(nsbox_container)
    for kind in ALWAYS:
        assert inside[kind] != os.readlink(f"/proc/self/ns/{kind}"), kind


@pytest.mark.sandbox(uptime="50d", userns=True)
def test_time_and_user_namespaces_are_there_when_asked_for(nsbox_container: Container) -> None:
    inside = namespaces_of(nsbox_container)
    for kind in (*ALWAYS, "time", "user"):
        assert inside[kind] != os.readlink(f"/proc/self/ns/{kind}"), kind


def test_two_containers_share_no_namespace(nsbox_container_factory: Any) -> None:
    a, b = (namespaces_of(nsbox_container_factory()) for _ in range(2))
    for kind in ALWAYS:
        assert a[kind] != b[kind], kind


def test_ps_shows_the_containers_processes_and_pid_1_is_ours(nsbox_container: Container) -> None:
    nsbox_container.popen(["sleep", "1000"])
    rows = nsbox_container.run(["ps", "-eo", "pid,comm", "--no-headers"], check=True).stdout
    names = {int(pid): name for pid, name in map(str.split, rows.splitlines())}
    assert names.pop(1) == "nsbox-init"
    assert sorted(names.values()) == ["ps", "sleep"]


def test_system_v_ipc_is_its_own(nsbox_container: Container) -> None:
    made = nsbox_container.run(["ipcmk", "-Q", "-M", "4096", "-S", "1"], check=True).stdout
    assert made.count("id:") == 3
    queues = nsbox_container.run(["ipcs", "-q"], check=True).stdout
    assert "0x" in queues
    assert "0x" not in "".join(Path("/proc/sysvipc/msg").read_text().splitlines()[1:])
    assert len(Path("/proc/sysvipc/shm").read_text().splitlines()) == 1


def test_posix_message_queues_are_its_own(nsbox_container_factory: Any) -> None:
    a, b = nsbox_container_factory(), nsbox_container_factory()
    assert "mqueue /dev/mqueue mqueue" in a.read_text("/proc/mounts")
    a.run(["touch", "/dev/mqueue/letters"], check=True)
    assert a.run(["ls", "/dev/mqueue"]).stdout == "letters\n"
    assert b.run(["ls", "/dev/mqueue"]).stdout == ""


@pytest.mark.sandbox(hostname="box.example", capabilities=["+SYS_ADMIN"])
def test_the_hostname_is_its_own(nsbox_container: Container) -> None:
    assert nsbox_container.run(["hostname"]).stdout == "box.example\n"
    nsbox_container.run(["hostname", "changed"], check=True)
    assert nsbox_container.run(["hostname"]).stdout == "changed\n"
    assert socket.gethostname() != "changed"


@pytest.mark.sandbox(capabilities=["+SYS_ADMIN"])
def test_mounts_are_its_own(nsbox_container: Container) -> None:
    nsbox_container.run(["mount", "-t", "tmpfs", "mine", "/mnt"], check=True)
    assert "mine /mnt" in nsbox_container.read_text("/proc/mounts")
    assert "mine /mnt" not in Path("/proc/mounts").read_text()


@pytest.mark.sandbox(uptime="50d")
def test_uptime_starts_where_it_is_told(nsbox_container: Container) -> None:
    script = "import time; print(time.clock_gettime(time.CLOCK_BOOTTIME), time.time())"
    boot, wall = nsbox_container.run(["python3", "-c", script], check=True).stdout.split()
    days = float(boot) / 86400
    assert 50 <= days < 50.01
    assert abs(float(wall) - time.time()) < 60  # the wall clock cannot be moved


@pytest.mark.sandbox(userns=True)
def test_root_in_a_user_namespace_has_no_power_over_the_host(nsbox_container: Container) -> None:
    """Files are the host root's copy-on-write as ever, the network is the container's own."""
    assert namespaces_of(nsbox_container)["user"] != os.readlink("/proc/self/ns/user")
    assert nsbox_container.run(["id", "-u"]).stdout == "0\n"
    nsbox_container.run(["ip", "link", "set", "lo", "down"], check=True)
    nsbox_container.run(["touch", "/etc/from-inside", "/usr/bin/from-inside"], check=True)
    assert not os.path.exists("/etc/from-inside")
    assert not os.path.exists("/usr/bin/from-inside")
    assert nsbox_container.run(["ping", "-c1", "-W1", "172.27.0.1"]).returncode == 0
