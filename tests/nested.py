"""Containers of other engines, to run pytest in: real ones by crun, and our own.

crun is the runtime that podman has by default and Docker can have. The configuration is that of
the engine: capabilities, masked paths, what of /sys may be written, devices.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_nsbox import Session
from pytest_nsbox.model.capabilities import NUMBERS
from tests.ordinary import REPOSITORY, run_as_ordinary_user

Environment = Callable[..., subprocess.CompletedProcess[str]]
HEAD_V2 = "on cgroup v2 alone, pytest runs as"
DEFAULT = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP "
    "NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE"
).split()
ADDED = [*DEFAULT, "SYS_ADMIN", "NET_ADMIN"]
PRIVILEGED = sorted(NUMBERS)
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


_PATIENCE = 300  # seconds; an emulated machine is slow


@dataclass(frozen=True)
class Engine:
    """How an engine starts a container."""

    capabilities: Sequence[str]
    masked: bool
    cgroups: str  # rw, ro or none; with "own" a cgroup and a namespace of it, on version 2
    refused: Sequence[str] = ()  # system calls that its seccomp profile refuses

    def run(self, place: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, in the current directory."""
        bundle = place / "bundle"
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(self._config(command)))
        script = """
            set -e
            mount --make-rprivate /
            # crun takes no controllers of both versions at once
            ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
            mount -t tmpfs none "$1"; cd "$1"; mkdir upper work rootfs
            # one overlay on another is the most that the kernel takes: the next is for the tests
            if [ "$(stat -f -c %T /)" = overlayfs ]; then mount --bind / rootfs
            else mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none rootfs
            fi
            cp "$2/config.json" .
            exec crun --root "$1/state" --cgroup-manager="$3" run nested
        """
        mounted = place / "mounted"
        mounted.mkdir()
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", mounted, bundle, self._manager],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )

    @property
    def _manager(self) -> str:
        return "cgroupfs" if self.cgroups.startswith("own") else "disabled"

    def _config(self, command: Sequence[str]) -> dict[str, Any]:
        caps = [f"CAP_{name}" for name in self.capabilities if f"CAP_{name}" in held()]
        keep = sorted(map(os.path.realpath, (os.getcwd(), sys.prefix, REPOSITORY, "/var/tmp")))
        bind = ["bind", "rw"]  # not what is mounted below: a /proc there would be unmasked
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "dev", "options": ["mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "run", "options": ["mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmp", "options": ["mode=1777"]},
            *(
                {"destination": path, "type": "bind", "source": path, "options": bind}
                for path in dict.fromkeys(keep)  # where the tmpfs on /tmp may hide it
            ),
        ]
        if self.cgroups.startswith("own"):
            options = ["nosuid", "noexec", "nodev", self.cgroups[-2:]]
            cgroup = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}
            mounts.append({**cgroup, "options": options})
        elif self.cgroups != "none":
            options = ["rbind", self.cgroups]
            cgroup = "/sys/fs/cgroup"
            mounts.append(
                {"destination": cgroup, "type": "bind", "source": cgroup, "options": options}
            )
            if self.cgroups == "ro":
                for name in sorted(os.listdir(cgroup)):
                    path = f"{cgroup}/{name}"
                    mounts.append(
                        {"destination": path, "type": "bind", "source": path, "options": options}
                    )
        kinds = ["pid", "network", "ipc", "uts", "mount"]
        linux: dict[str, Any] = {}
        if self.cgroups.startswith("own"):
            kinds.append("cgroup")
            linux["cgroupsPath"] = "/nested"
        linux["namespaces"] = [{"type": kind} for kind in kinds]
        if self.masked:
            linux |= {"maskedPaths": MASKED, "readonlyPaths": READ_ONLY}
        if self.refused:
            linux["seccomp"] = {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": [*self.refused], "action": "SCMP_ACT_ERRNO"}],
            }
        return {
            "ociVersion": "1.0.0",
            "root": {"path": "rootfs"},
            "hostname": "nested",
            "process": {
                "cwd": os.getcwd(),
                "args": [*command],
                "env": [f"{key}={value}" for key, value in os.environ.items()],
                "user": {"uid": 0, "gid": 0},
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), caps),
            },
            "mounts": mounts,
            "linux": linux,
        }


def held() -> set[str]:
    """The capabilities that we have to give."""
    status = Path("/proc/self/status").read_text()
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line[:7] == "CapBnd:")
    return {f"CAP_{name}" for name, number in NUMBERS.items() if mask >> number & 1}


def on_this_host(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)


def root_service(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """What systemd runs for the machine: a cgroup that holds processes, delegated to nobody."""
    service = ["systemd-run", "--wait", "--pipe", "--quiet", f"--working-directory={os.getcwd()}"]
    service += [f"--setenv={key}={os.environ[key]}" for key in os.environ if key[:7] == "PYTEST_"]
    return on_this_host(place, *service, *command)


def ordinary_user(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A user as adduser(8) makes one: with subordinate ids, without a control group of its own."""
    for path in (place / "test_it.py", place / "examples"):
        subprocess.run(["chmod", "-R", "a+rX", path], check=True)
    (place / "home").mkdir()
    for name in ("test_it.py", "examples"):
        (place / name).rename(place / "home" / name)
    return run_as_ordinary_user(place, *command)


def without_power(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Root in name only: what there is to have, a user namespace gives."""
    prefix = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all"]
    return subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=120)


def in_our_own(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In a container of this package, made to be a host of others."""
    with Session() as session:
        here = [os.getcwd(), str(REPOSITORY), "/var/tmp"]
        with session.container(privileged=True, network="isolated", visible=here) as outer:
            return outer.run([*command], cwd=os.getcwd(), timeout=120)


ENVIRONMENTS: dict[str, Environment] = {
    "root on the host": on_this_host,
    "an ordinary user, no cgroup delegated": ordinary_user,
    "root without CAP_SYS_ADMIN, so as an ordinary user": without_power,
    "docker run --privileged": Engine(PRIVILEGED, masked=False, cgroups="rw").run,
    "docker run --cap-add SYS_ADMIN --cap-add NET_ADMIN": Engine(
        ADDED, masked=True, cgroups="ro"
    ).run,
    "the same, SYS_TIME added, cgroups writable": Engine(
        [*ADDED, "SYS_TIME"], masked=True, cgroups="rw"
    ).run,
    "docker run --security-opt seccomp=, apparmor=, systempaths=unconfined": Engine(
        DEFAULT, masked=False, cgroups="ro"
    ).run,
    "docker run": Engine(DEFAULT, masked=True, cgroups="ro", refused=["mount", "unshare"]).run,
    "privileged, but seccomp refuses mount": Engine(
        PRIVILEGED, masked=False, cgroups="rw", refused=["mount"]
    ).run,
    "privileged, no cgroups mounted": Engine(PRIVILEGED, masked=False, cgroups="none").run,
    "a container of our own, privileged=True": in_our_own,
}
"""Where pytest runs, by what a user writes or has."""

ON_V2: dict[str, dict[str, Environment]] = {
    "root": {
        "root": on_this_host,
    },
    "containers": {
        "docker run --privileged, a cgroup namespace": Engine(
            PRIVILEGED, masked=False, cgroups="own rw"
        ).run,
        "docker run --cap-add, read-only /sys/fs/cgroup": Engine(
            ADDED, masked=True, cgroups="own ro"
        ).run,
    },
    "service": {"root, a service of systemd": root_service},
    "systemd": {"a user whom systemd has logged in": on_this_host},
    "delegated": {"a user with a cgroup delegated": on_this_host},
    "alone": {"a user with nothing delegated, one id": on_this_host},
}
"""The same where cgroups are of version 2 alone, by lane of ci/v2."""

FEATURES = {
    "nat": "network='nat'",
    "isolated": "network='isolated'",
    "inside": "",
    "memory": "memory='64M'",
    "pids": "pids=20",
    "cpus": "cpus=1",
    "cpuset": "cpuset='0'",
    "io": "io={'wbps': '10M'}",
    "disk": "disk='10M'",
    "uptime": "uptime='50d'",
    "userns": "userns=True",
    "sysctls": "sysctls={'net.ipv4.ip_forward': 1}",
    "read_only": "read_only=True",
    "privileged": "privileged=True",
}
"""Columns of the table: a test each, by its keywords; `inside` has its body inside."""


def source() -> str:
    """The test file that every environment runs."""
    text = "import pytest\n"
    for name, keywords in FEATURES.items():
        text += f"\n@pytest.mark.sandbox({keywords})\n"
        if name == "inside":
            text += f"def test_{name}():\n    open('/etc/hosts', 'w').close()\n"
        else:
            text += f"def test_{name}(nsbox_container):\n"
            text += "    nsbox_container.run(['true'], check=True)\n"
    return text


@dataclass(frozen=True)
class Row:
    """What came of the tests in one environment."""

    cells: dict[str, str]  # works, or no
    examples: str
    output: str

    def text(self, name: str) -> str:
        return "| " + " | ".join([name, *self.cells.values(), self.examples]) + " |"


def head(where: str = "pytest runs as") -> list[str]:
    names = [where, *(f"`{name}`" for name in FEATURES), "examples"]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def try_in(environment: Environment, place: Path) -> Row:
    """Run the tests and the examples in an environment, below the empty directory `place`."""
    (place / "test_it.py").write_text(source())
    examples = REPOSITORY / "examples"
    shutil.copytree(examples, place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    before = os.getcwd()
    os.chdir(place)
    try:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q"]
        done = environment(place, *command, "test_it.py", "examples")
    finally:
        os.chdir(before)
    passed = set(re.findall(r"^PASSED (\S+)", done.stdout, re.M))
    cells = {
        feature: "works" if f"test_it.py::test_{feature}" in passed else "no"
        for feature in FEATURES
    }
    return Row(
        cells,
        str(len([test for test in passed if test.startswith("examples/")])),
        done.stdout + done.stderr,
    )


def main() -> None:
    """Print the table of docs/where-it-runs.md, found by running; in a machine of ci/v2 its rows of
    the other one."""
    lane = os.environ.get("NSBOX_LANE")
    print("\n".join(head() if lane is None else head(HEAD_V2)))
    for name, environment in (ENVIRONMENTS if lane is None else ON_V2[lane]).items():
        with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
            print(try_in(environment, Path(place)).text(name), flush=True)


if __name__ == "__main__":
    main()
