"""Every probe with what it is needed for and how it is cured, and the table that is shown."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_nsbox.doctor import controllers, host, probes
from pytest_nsbox.errors import NsboxError
from pytest_nsbox.kernel import cgroup, userns
from pytest_nsbox.kernel.probe import Outcome, attempt_all, outcome_of

DEADLINE = 10.0  # seconds; all have answered after one, unless the machine is overloaded


@dataclass(frozen=True)
class Check:
    """One line. `needed` is by whom a default test needs it: root, user, both, or nobody."""

    name: str
    probe: Callable[[], str | None] | None  # None: one of the control groups' outcomes
    needs: str  # marker keywords
    needed: tuple[str, ...]
    cure: Callable[[], str]


def _privileged() -> str:
    if os.geteuid() == 0 and not host.container_kind():
        return "run as root with all capabilities"
    if os.geteuid() == 0:
        return host.grant("--privileged")
    return "run as root"


def _user_namespaces() -> str:
    for name, bad, good in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "10000"),
    ):
        path = Path("/proc/sys", name)
        if path.exists() and path.read_text().strip() == bad:
            return f"{host.sudo()}sysctl -w {name.replace('/', '.')}={good}"
    if host.container_kind():
        return host.grant("--privileged")
    return f"{host.sudo()}sysctl -w user.max_user_namespaces=10000"


def _masked_proc() -> str:
    if host.container_kind() == "podman":
        return host.grant("--security-opt unmask=ALL")
    return host.grant("--security-opt systempaths=unconfined")


def _module(name: str) -> Callable[[], str]:
    def cure() -> str:
        release = os.uname().release
        modules = Path("/lib/modules", release)
        if modules.is_dir() and not any(modules.rglob(f"*{name}.ko*")):
            return host.install("kernel modules", host.distribution())
        return f"{host.sudo()}modprobe {name}" + (" (on the host)" * bool(host.container_kind()))

    return cure


def _package(name: str) -> Callable[[], str]:
    return lambda: host.install(name, host.distribution())


def _tunnel(name: str) -> Callable[[], str]:
    package = _package(name)
    return lambda: package() if shutil.which(name) is None else _tun()


def _clock() -> str:
    if host.container_kind() and userns.is_administrator():
        return host.grant("--cap-add SYS_TIME")
    return _privileged()


def _tun() -> str:
    if not os.path.exists("/dev/net/tun"):
        if host.container_kind():
            return host.grant("--device /dev/net/tun")
        return f"{host.sudo()}modprobe tun"
    return f"{host.sudo()}chmod 666 /dev/net/tun"


def _delegation() -> str:
    if host.container_kind():
        return host.grant("--privileged") + ", or mount /sys/fs/cgroup writable"
    if os.geteuid() != 0:
        return "systemd-run --user --scope -p Delegate=yes pytest"
    return "mount the controller: mount -t cgroup2 none /sys/fs/cgroup"


def _forwarding() -> str:
    accept = "iptables -I FORWARD -i nsbox+ -j ACCEPT; iptables -I FORWARD -o nsbox+ -j ACCEPT"
    return f"{host.install('slirp4netns', host.distribution())} (it is then taken), or: {accept}"


def _subids() -> str:
    if not os.path.exists("/usr/bin/newuidmap"):
        return host.install("uidmap", host.distribution())
    return f"{host.sudo()}usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $USER"


ROOT, USER = "root", "user"
BOTH = (ROOT, USER)

CHECKS = (
    Check("namespaces", probes.other_namespaces, "every test", BOTH, _privileged),
    Check("user namespaces", probes.user_namespace, "userns", (USER,), _user_namespaces),
    Check("time namespace", probes.time_namespace, "uptime", (), _clock),
    Check("/proc", probes.proc_mount, "every test", BOTH, _privileged),
    Check(
        "/proc below a user namespace",
        probes.proc_mount_in_user_namespace,
        "userns",
        (),
        _masked_proc,
    ),
    Check(
        "overlay on /", probes.overlay_root, "rootfs, disk, read_only", (ROOT,), _module("overlay")
    ),
    Check("overlay by directory", probes.overlay_directory, "userns", (USER,), _module("overlay")),
    *(
        Check(f"cgroup {name}", None, keywords, (), _delegation)
        for name, keywords in (
            ("memory", "memory"),
            ("swap", "swap"),
            ("pids", "pids"),
            ("cpu", "cpus"),
            ("cpuset", "cpuset"),
            ("io", "io"),
            ("freezer", "pause()"),
        )
    ),
    Check("veth, bridge", probes.veth_and_bridge, "network, networks", BOTH, _privileged),
    Check("nft masquerade", probes.masquerade, "network=nat", (ROOT,), _module("nft_masq")),
    Check("forwarding", probes.forwarding_policy, "network=nat", (), _forwarding),
    Check("netem", probes.netem, "latency, loss", (), _module("sch_netem")),
    Check("tun", probes.tun, "/dev/net/tun", (), _tun),
    Check("pasta", probes.pasta, "network=nat of a user", (), _tunnel("pasta")),
    Check("slirp4netns", probes.slirp4netns, "network=nat of a user", (), _tunnel("slirp4netns")),
    Check("subordinate ids", probes.subordinate_ids, "user", (), _subids),
    Check("seccomp", probes.system_call_filter, "every test", BOTH, _privileged),
    Check("disk", probes.disk_room, "rootfs, memory, io", (), lambda: "nsbox cache prune"),
    Check(
        "inotify",
        probes.inotify_room,
        "programs that watch files",
        (),
        lambda: f"{host.sudo()}sysctl -w fs.inotify.max_user_instances=1024",
    ),
    Check(
        "a container", probes.a_container, "every test", BOTH, lambda: "see what is missing above"
    ),
)


@dataclass(frozen=True)
class Finding:
    """What is said about one facility."""

    name: str
    works: bool
    why: str
    cure: str
    keywords: str
    needed: bool


def examine(name: str, record: Callable[[str], None]) -> list[Finding]:
    """Try everything, at once. Cgroups are named after `name`, and `record` is told of each
    before it is made: a doctor may be killed."""
    driver, why_not = None, ""
    paths: list[str] = []
    try:
        driver = cgroup.detect(name)
        for path in driver.session_paths():
            record(path)
            paths.append(path)
    except (NsboxError, OSError) as error:
        driver, why_not = None, str(error)
    groups = {check.name: _group(check.probe) for check in CHECKS if check.probe}
    groups["cgroups"] = lambda: controllers.control_groups(driver, why_not)
    try:
        told = attempt_all(groups, DEADLINE)
    finally:
        for path in reversed(paths):  # what a probe that was killed has left
            cgroup.remove_tree(path)
    who = ROOT if userns.is_administrator() else USER
    cgroups = iter(told["cgroups"])
    late = Outcome(False, f"no answer within {DEADLINE} s")
    findings = []
    for check in CHECKS:
        outcomes = cgroups if check.probe is None else iter(told[check.name])
        outcome = next(outcomes, late)
        cure = "" if outcome.works else _cure(check, outcome.text)
        findings.append(
            Finding(check.name, outcome.works, outcome.text, cure, check.needs, who in check.needed)
        )
    return findings


def _cure(check: Check, why: str) -> str:
    """What the kernel refuses as a whole is no matter of a module that is missing."""
    refused = os.strerror(errno.EPERM)
    if f"CLONE_NEWUSER: {refused}" in why:
        return _user_namespaces()
    cure = check.cure()
    return _privileged() if refused in why and "modprobe" in cure else cure


def _group(probe: Callable[[], str | None]) -> Callable[[], Iterator[Outcome]]:
    return lambda: iter([outcome_of(probe)])


def status(findings: list[Finding]) -> int:
    """0: all that a default test needs works; 1: something of that is missing."""
    return int(any(finding.needed and not finding.works for finding in findings))


def as_data(findings: list[Finding]) -> dict[str, Any]:
    return {
        "host": host.describe(),
        "ok": not status(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def as_text(findings: list[Finding], color: bool) -> str:
    def paint(code: int, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if color else text

    lines = [f"{name:12}{text}" for name, text in host.describe().items()] + [""]
    wide = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = (
            paint(32, "works  ")
            if finding.works
            else paint(31 if finding.needed else 33, "MISSING" if finding.needed else "missing")
        )
        text = finding.why if finding.works else f"{finding.why}"
        lines.append(
            f"{mark}  {finding.name:{wide}}  {finding.keywords}" + (f": {text}" if text else "")
        )
        if finding.cure:
            lines.append(f"{'':{wide + 11}}cure: {finding.cure}")
    missing = [finding.name for finding in findings if finding.needed and not finding.works]
    lines += [
        "",
        f"default tests cannot run: {', '.join(missing)}" if missing else "default tests can run",
    ]
    return "\n".join(lines)
