"""`nsbox doctor` tries, tells the truth on hosts that lack something, and leaves nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from pytest_nsbox.doctor import host
from tests.audit import Snapshot

DOCTOR = [
    sys.executable,
    "-c",
    "from pytest_nsbox.cli import main; raise SystemExit(main())",
    "doctor",
]


def examine(*prefix: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status and the findings by name, on a host made poorer by `prefix`."""
    done = subprocess.run([*prefix, *DOCTOR, "--json"], capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    data = json.loads(done.stdout)
    assert data["ok"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in data["findings"]}


def without(script: str) -> list[str]:
    """A prefix: the rest runs in a mount namespace that `script` has changed."""
    return ["unshare", "-m", "sh", "-c", f'{script}; exec "$@"', "sh"]


def test_on_this_host_all_that_tests_need_works(nothing_left: Snapshot) -> None:
    started = time.monotonic()
    status, found = examine()
    assert time.monotonic() - started < 6  # 0.9 s on an idle machine
    assert status == 0
    assert not [f for f in found.values() if f["needed"] and not f["works"]]
    for name in ("memory", "swap", "pids", "cpu", "cpuset", "io", "freezer"):
        assert found[f"cgroup {name}"]["works"], found[f"cgroup {name}"]


def test_without_sys_admin_it_fails_and_names_the_cure(nothing_left: Snapshot) -> None:
    limit = "echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-sys_admin"
    script = f'mount -t proc proc /proc; {limit} "$@"'
    status, found = examine("unshare", "-Urmpf", "sh", "-c", script, "sh")
    assert status == 1
    for name in ("namespaces", "user namespaces", "a container"):
        assert not found[name]["works"]
        assert found[name]["needed"]
    assert "unshare CLONE_NEWUSER" in found["namespaces"]["why"]
    assert "max_user_namespaces" in found["user namespaces"]["cure"]
    assert not any("no answer" in each["why"] for each in found.values())


def test_root_without_sys_admin_is_examined_as_a_user(nothing_left: Snapshot) -> None:
    status, found = examine("setpriv", "--bounding-set=-sys_admin")
    assert found["namespaces"]["works"], found["namespaces"]
    assert found["overlay by directory"]["needed"]
    assert not found["overlay on /"]["needed"]
    assert found["a container"]["works"] == (status == 0), found["a container"]


def test_without_cgroups_limits_are_missing_and_the_rest_is_enough() -> None:
    hidden = "mount -t tmpfs none /sys/fs/cgroup"
    status, found = examine(*without(hidden))
    assert status == 0
    for name in ("memory", "swap", "pids", "cpu", "cpuset", "io", "freezer"):
        finding = found[f"cgroup {name}"]
        assert not finding["works"]
        assert "no cgroup can be written" in finding["why"]
        assert finding["cure"]
    assert found["a container"]["works"], found["a container"]


def test_a_masked_proc_is_found_by_mounting_one() -> None:
    status, found = examine(
        *without("mount -t tmpfs none /proc/acpi || mount -t tmpfs none /proc/irq")
    )
    assert status == 0
    finding = found["/proc below a user namespace"]
    assert not finding["works"]
    assert "parts of /proc are masked here" in finding["why"]
    assert re.search("unmask=ALL|systempaths=unconfined", finding["cure"])
    assert found["/proc"]["works"]


def test_what_a_container_lacks_has_the_cure_for_containers() -> None:
    in_docker = ("env", "container=docker")
    _, found = examine(*in_docker, "setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time")
    assert found["time namespace"]["cure"].startswith("docker run --cap-add SYS_TIME ")
    no_tun = without("mount -t tmpfs none /dev/net")
    _, found = examine(*in_docker, *no_tun, "setpriv", "--bounding-set=-sys_admin")
    for program in ("pasta", "slirp4netns"):
        assert "/dev/net/tun" in found[program]["why"]
        assert found[program]["cure"].startswith("docker run --device /dev/net/tun ")
    assert found["overlay on /"]["cure"].startswith("docker run --privileged ")


def test_a_refused_user_namespace_is_found() -> None:
    """As with a limit of none; AppArmor refuses later, at the netlink call."""
    limit = "unshare -U -r true && echo 0 >/proc/sys/user/max_user_namespaces"
    script = f"mount -t proc proc /proc; {limit}"
    status, found = examine(
        "unshare", "-U", "-m", "-r", "-p", "-f", "sh", "-c", f'{script}; exec "$@"', "sh"
    )
    assert status in (0, 1)
    assert not found["user namespaces"]["works"]
    assert "max_user_namespaces" in found["user namespaces"]["cure"]


def test_a_dropping_forward_chain_is_found() -> None:
    chain = "{ type filter hook forward priority 0; policy drop; }"
    rules = f"add table ip t; add chain ip t FORWARD {chain}"
    _, found = examine("unshare", "-n", "sh", "-c", f'nft "{rules}"; exec "$@"', "sh")
    assert not found["forwarding"]["works"]
    assert "t/FORWARD drops what is forwarded" in found["forwarding"]["why"]
    assert "slirp4netns" in found["forwarding"]["cure"]


HANGS = """
import os, signal, sys
from pytest_nsbox.cli import main
from pytest_nsbox.doctor import controllers, table
from pytest_nsbox.model.limits import Limits

def hang(driver):
    group = controllers._group(driver, Limits(memory=16 << 20, pids=5, cpuset="0"))
    read, write = os.pipe()
    controllers._join(group, lambda: os.write(write, b"1") and signal.pause())
    os.read(read, 1)
    group.freeze()
    if sys.argv[1] == "killed":
        os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()

controllers.CONTROLLERS["freezer"] = hang
# of the others one makes a session, which would sweep what this one leaves
table.CHECKS = tuple(check for check in table.CHECKS if check.probe is None)
table.DEADLINE = 3.0
raise SystemExit(main(["doctor", "--json"]))
"""


def test_a_killed_doctor_leaves_nothing_that_gc_does_not_sweep(nothing_left: Snapshot) -> None:
    """In the midst of a trial, with a frozen process, which no signal ends."""
    done = subprocess.run([sys.executable, "-c", HANGS, "killed"], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    gc = [*DOCTOR[:-1], "gc"]
    checked = subprocess.run([*gc, "--check"], capture_output=True, text=True)
    assert checked.returncode == 1
    assert "left: cgroup /sys/fs/cgroup/" in checked.stdout
    swept = subprocess.run(gc, capture_output=True, text=True, check=True)
    assert "removed cgroup /sys/fs/cgroup/" in swept.stdout
    checked = subprocess.run([*gc, "--check"], capture_output=True, text=True)
    assert "left: " not in checked.stdout


def test_a_trial_that_hangs_is_ended_and_leaves_nothing(nothing_left: Snapshot) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, "late"], capture_output=True, timeout=60)
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert "no answer within" in found["cgroup freezer"]["why"]
    assert found["cgroup io"]["why"]


def test_a_controller_that_does_not_bite_is_missing() -> None:
    """One that is there and takes every value, as some sandboxes have it."""
    toothless = """
from pytest_nsbox.cli import main
from pytest_nsbox.kernel import cgroup_files as files
LIMITS = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "pids.max", "cpu.cfs_quota_us",
    "cpuset.cpus", "blkio.throttle.write_bps_device", "freezer.state")
write, read = files.write, files.read
def pretend(path, value):
    if "/probe-" not in path or not path.endswith(LIMITS):
        write(path, value)
files.write = pretend
files.read = lambda path: "FROZEN\\n" if path.endswith("freezer.state") else read(path)
raise SystemExit(main(["doctor", "--json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", toothless], capture_output=True, text=True, timeout=60
    )
    assert done.stdout, done.stderr
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    for name in ("memory", "swap", "pids", "cpu", "cpuset", "io", "freezer"):
        assert not found[f"cgroup {name}"]["works"], name
    for word in ("memory=16M lets", "memory=16M, swap=0 lets", "pids=2 lets", "does not throttle"):
        assert any(word in each["why"] for each in found.values()), word
    assert "lets a process write" in found["cgroup io"]["why"]
    assert "a frozen process goes on" in found["cgroup freezer"]["why"]


def test_the_table_is_for_people_and_has_no_color_in_a_pipe() -> None:
    done = subprocess.run(DOCTOR, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\033" not in done.stdout
    assert done.stdout.startswith("runs as")
    assert done.stdout.endswith("default tests can run\n")


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("ID=ubuntu\nID_LIKE=debian", "apt-get install -y uidmap"),
        ('ID="rocky"\nID_LIKE="rhel fedora"', "dnf install -y shadow-utils"),
        ("ID=alpine", "apk add shadow-uidmap"),
        ("ID=arch", "pacman -S --noconfirm shadow"),
        ('ID=tumbleweed\nID_LIKE="opensuse suse"', "zypper install -y shadow"),
        ("ID=unheard-of", "install uidmap with this system's package manager"),
    ],
)
def test_a_cure_is_for_this_distribution(release: str, command: str) -> None:
    assert host.install("uidmap", host.distribution(release)).removeprefix("sudo ") == command
