"""Where pytest can run, what is tried there, and containers of crun that stand in for Docker's and
podman's (`engines.py`) on a machine that has neither.

crun is the runtime that podman has by default and Docker can have. The configuration is that of
the engine: capabilities, masked paths, what of /sys may be written, devices, and of its seccomp
profile the calls that decide.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_nsbox import Session
from pytest_nsbox.model.capabilities import NUMBERS
from tests import engines
from tests.engines import Environment
from tests.ordinary import REPOSITORY, run_as_ordinary_user

PAGE = (REPOSITORY / "docs/where-it-runs.md").read_text()
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
        keep = sorted(map(os.path.realpath, (os.getcwd(), sys.prefix, REPOSITORY)))
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
    "root": on_this_host,
    "an ordinary user, no cgroup delegated": ordinary_user,
    "root without CAP_SYS_ADMIN, so as an ordinary user": without_power,
    "root of a container of our own, privileged=True": in_our_own,
}
"""As whom pytest runs, without another engine."""

_UNMASKED_OF_PODMAN = Engine(DEFAULT, masked=False, cgroups="ro", refused=["sethostname", "setns"])
STAND_INS: dict[str, Engine] = {
    "docker run --privileged": Engine(PRIVILEGED, masked=False, cgroups="rw"),
    "docker run --cap-add SYS_ADMIN --cap-add NET_ADMIN": Engine(
        ADDED, masked=True, cgroups="ro", refused=["pivot_root"]
    ),
    "the same, --cap-add SYS_TIME -v /sys/fs/cgroup:/sys/fs/cgroup": Engine(
        [*ADDED, "SYS_TIME"], masked=True, cgroups="rw", refused=["pivot_root"]
    ),
    "docker run --security-opt seccomp=, apparmor=, systempaths=unconfined": Engine(
        DEFAULT, masked=False, cgroups="ro"
    ),
    "docker run": Engine(DEFAULT, masked=True, cgroups="ro", refused=["mount", "unshare"]),
    "podman run --security-opt unmask=ALL": _UNMASKED_OF_PODMAN,
}
"""For some of `engines.ENVIRONMENTS`."""

LANES: dict[str, dict[str, Environment]] = {
    "host": ENVIRONMENTS,
    "engines": engines.ENVIRONMENTS,
    "root": {
        "root": on_this_host,
    },
    "containers": {
        "docker run --privileged, a cgroup namespace": Engine(
            PRIVILEGED, masked=False, cgroups="own rw"
        ).run,
        "docker run --cap-add, read-only /sys/fs/cgroup": Engine(
            ADDED, masked=True, cgroups="own ro", refused=["pivot_root"]
        ).run,
    },
    "service": {"root, a service of systemd": root_service},
    "systemd": {"a user whom systemd has logged in": on_this_host},
    "delegated": {"a user with a cgroup delegated": on_this_host},
    "alone": {"a user with nothing delegated, one id": on_this_host},
}
"""The rows of the tables in docs/where-it-runs.md, by what makes their machine: nothing,
`ci/engines`, or a lane of `ci/v2`."""
HEADS = {
    "host": "pytest runs as",
    "engines": "pytest runs as root in a container of",
    **dict.fromkeys([*LANES][2:], "on cgroup v2 alone, pytest runs as"),
}

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

    def unexplained(self) -> Iterator[str]:
        """What was refused without a word before the first test, or without reason and cure."""
        first = re.search(r"^\S+::\S+ (PASSED|ERROR|FAILED)", self.output, re.M)
        before = self.output[: first.start()] if first else ""
        for feature, cell in self.cells.items():
            said = re.search(rf"^test_it.py::test_{feature}: (.*)$", self.output, re.M)
            if cell == "works":
                continue
            if f"\n  test_it.py::test_{feature}\n" not in before:
                yield f"{feature}: nothing was said before"
            if not said or not re.search(CURES, said[1]):
                yield f"{feature}: {said and said[1]}"


CURES = (
    "Delegate=yes|writable /sys/fs/cgroup|/sys/fs/cgroup writable|docker run --privileged|"
    "--cap-add SYS_TIME|systempaths=unconfined|XDG_CACHE_HOME"
)


def head(lane: str) -> list[str]:
    names = [HEADS[lane], *(f"`{name}`" for name in FEATURES), "examples"]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def try_in(environment: Environment, place: Path) -> Row:
    """Run the tests and the examples in an environment, below the empty directory `place`."""
    (place / "test_it.py").write_text(source())
    examples = REPOSITORY / "examples"
    shutil.copytree(examples, place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    before = os.getcwd()
    os.chdir(place)
    try:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-v"]
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
    """Print a table of docs/where-it-runs.md, found by running; in `ci/engines` and in a machine of
    `ci/v2` its rows of theirs."""
    lane = os.environ.get("NSBOX_LANE", "host")
    print("\n".join(head(lane)))
    for name, environment in LANES[lane].items():
        with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
            print(try_in(environment, Path(place)).text(name), flush=True)


if __name__ == "__main__":
    main()
