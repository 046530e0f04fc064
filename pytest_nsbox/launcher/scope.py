"""A cgroup of the user's own to divide: a transient scope of the systemd that runs for the user.

busctl(1), which comes with systemd, asks it over the user's D-Bus. The test process moves there
with the launcher: who is in a login's `session-N.scope` could not be moved into a container, as
only root may write to what both have above them (cgroups(7), cgroup v2 delegation containment).
"""

from __future__ import annotations

import os
import shutil
import subprocess

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel import cgroup

_PATIENCE = 10.0  # seconds for systemd to answer
_MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
_START = ("org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))")


def enter_scope(parent: int) -> str:
    """Move the caller and the process `parent` into a scope, where limits need one.

    Returns why there is none, where it was needed and could not be had, else nothing. The caller
    must not have entered a user namespace: the bus knows users as the host does.
    """
    if os.geteuid() == 0 or not _needed():
        return ""
    if not os.path.exists("/run/systemd/system") or shutil.which("busctl") is None:
        return "no systemd runs here that could give one"
    unit = f"nsbox-{os.getpid()}.scope"
    properties = ["3", "PIDs", "au", "2", str(os.getpid()), str(parent), "Delegate", "b", "true"]
    properties += ["Description", "s", "tests in containers (pytest-nsbox)"]
    try:
        _ask("busctl", "--user", "call", *_MANAGER, *_START, unit, "fail", *properties, "0")
        _ask("systemctl", "--user", "start", unit)  # the call has only queued it; this waits
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"the user's systemd gives none: {str(said).strip()}"
    return ""


def _needed() -> bool:
    """Whether this is cgroup v2 alone, and nothing of it is ours to divide."""
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return False
    try:
        cgroup.detect("probe")
    except UnsupportedError:
        return True
    return False


def _ask(*command: str) -> None:
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )
