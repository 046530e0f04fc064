"""How we run, and which command cures what is missing on this distribution."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pytest_nsbox.model.capabilities import NUMBERS

_MANAGERS = {
    "apt": ("apt-get install -y", "debian ubuntu linuxmint raspbian pop"),
    "dnf": ("dnf install -y", "fedora rhel centos rocky almalinux amzn ol"),
    "apk": ("apk add", "alpine"),
    "pacman": ("pacman -S --noconfirm", "arch manjaro endeavouros"),
    "zypper": ("zypper install -y", "suse opensuse sles opensuse-leap opensuse-tumbleweed"),
}
_PACKAGES = {
    "uidmap": {
        "apt": "uidmap",
        "dnf": "shadow-utils",
        "apk": "shadow-uidmap",
        "pacman": "shadow",
        "zypper": "shadow",
    },
    "pasta": dict.fromkeys(_MANAGERS, "passt"),
    "slirp4netns": dict.fromkeys(_MANAGERS, "slirp4netns"),
    "kernel modules": {"apt": "linux-modules-extra-$(uname -r)", "dnf": "kernel-modules-extra"},
}


@dataclass(frozen=True)
class Distribution:
    """As os-release(5) names it."""

    name: str
    manager: str  # a key of _MANAGERS, or ""


def distribution(text: str | None = None) -> Distribution:
    """Of this host, or of one whose os-release has this text."""
    if text is None:
        found = [
            path for path in ("/etc/os-release", "/usr/lib/os-release") if os.path.exists(path)
        ]
        text = Path(found[0]).read_text(encoding="utf-8", errors="replace") if found else ""
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    fields = {key: value.strip().strip("\"'") for key, value in fields.items()}
    ids = [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]
    for id in ids:
        for manager, (_, names) in _MANAGERS.items():
            if id in names.split():
                return Distribution(fields.get("PRETTY_NAME", id), manager)
    return Distribution(fields.get("PRETTY_NAME", "an unknown distribution"), "")


def install(what: str, where: Distribution) -> str:
    """The command that installs what is missing."""
    package = _PACKAGES[what].get(where.manager, what)
    if not where.manager:
        return f"install {package} with this system's package manager"
    return f"{sudo()}{_MANAGERS[where.manager][0]} {package}"


def sudo() -> str:
    return "" if os.geteuid() == 0 else "sudo "


def missing_capabilities(names: Iterable[str]) -> list[str]:
    """Which of these the calling process does not have (effective)."""
    status = Path("/proc/self/status").read_text()
    effective = next(int(s.split()[1], 16) for s in status.splitlines() if s[:7] == "CapEff:")
    return [name for name in names if not effective >> NUMBERS[name] & 1]


def container_kind() -> str:
    """Which container engine runs us, as far as it lets itself be seen; "" for none."""
    if os.path.exists("/.dockerenv"):
        return "docker"
    if os.path.exists("/run/.containerenv"):
        return "podman"
    # systemd and podman set it, in lower case
    named = os.environ.get("container", "")  # noqa: SIM112
    if named:
        return named
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    root = next((s for s in _lines("/proc/self/mountinfo") if s.split()[4] == "/"), "")
    return "a container" if " - overlay " in root and not _has_boot_loader() else ""


def _has_boot_loader() -> bool:
    return any(os.path.isdir(path) for path in ("/boot/grub", "/boot/efi", "/boot/loader"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def describe() -> dict[str, str]:
    """How we run."""
    release = platform.release()
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    where = container_kind()
    found = {
        "runs as": who + (f" in {where}" if where else ""),
        "system": distribution().name,
        "kernel": f"Linux {release}" + (" (WSL 2)" if "microsoft" in release.lower() else ""),
        "python": platform.python_version(),
    }
    if os.geteuid() == 0:
        lacking = missing_capabilities(("SYS_ADMIN", "NET_ADMIN"))
        if lacking:
            found["runs as"] += ", without " + ", ".join(f"CAP_{name}" for name in lacking)
    return found


def grant(flags: str) -> str:
    """How a container that we run in is given more."""
    kind = container_kind()
    engine = kind if kind in ("docker", "podman") else "docker"
    return f"{engine} run {flags} (kubernetes: securityContext.privileged: true)"
