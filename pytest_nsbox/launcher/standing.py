"""As whom the launcher works: as root, or as an ordinary user who is root in a user namespace.

This is decided once, before anything is forked or made. From there on both are root in the
namespace that they are in, and the same code serves; what differs is asked of `Standing`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.kernel import libc, userns
from pytest_nsbox.launcher.envoy import Envoy

_SUBORDINATE = 65535  # ids beside root's: what images and the user `nobody` need


@dataclass(frozen=True)
class Standing:
    """What kind of root the launcher is."""

    rootless: bool = False
    first_id: int = 0  # of the subordinate ids that are mapped; 0: none are
    envoy: Envoy | None = None  # rootless: its hand outside the user namespace

    @property
    def cache_name(self) -> str:
        """The directory below the cache for what is unpacked: its owners are of the mapping."""
        if not self.rootless:
            return ""
        return f"ids-{self.first_id}" if self.first_id else "one-id"

    def describe(self) -> str:
        if not self.rootless:
            return "root"
        return "rootless, " + ("with subordinate ids" if self.first_id else "with one id only")


def take_standing() -> Standing:
    """Become root in a user namespace, unless the caller is root in earnest.

    Raises UnsupportedError where no such namespace is to be had.
    """
    if userns.is_administrator():
        return Standing()
    ids = {"uid": os.geteuid(), "gid": os.getegid()}
    envoy = Envoy.start()
    try:
        libc.unshare(libc.CLONE_NEWUSER)
        first = _map_subordinates(envoy, ids)
        if not first:
            _map_one(ids)
        # who enters a container's, to name it, comes back only to one of this user namespace
        libc.unshare(libc.CLONE_NEWUTS)
        # podman's seccomp profile lets all pass but this, and setns(2)
        libc.sethostname(os.uname().nodename)
    except OSError as error:
        envoy.close()
        raise UnsupportedError(_refused(error)) from error
    return Standing(True, first, envoy)


def _map_subordinates(envoy: Envoy, ids: dict[str, int]) -> int:
    """Make the user root, and the ids above it subordinate ones (newuidmap(1)).

    Returns the first of those, or 0, nothing mapped, where the user has none.
    """
    firsts = {kind: _subordinates_of(ids["uid"], kind) for kind in ids}
    if not all(firsts.values()) or not all(map(shutil.which, ("newuidmap", "newgidmap"))):
        return 0
    for kind, id in ids.items():
        extents = [0, id, 1, 1, firsts[kind], _SUBORDINATE]
        try:
            envoy.run(f"new{kind}map", str(os.getpid()), *map(str, extents))
        except NsboxError as error:
            if kind == "uid":
                return 0  # a container may have the program without its privilege
            raise OSError(errno.EPERM, str(error)) from None
    return firsts["uid"]


def _subordinates_of(uid: int, kind: str) -> int:
    """The first of the ids that a user may map (subuid(5), subgid(5)); 0 when they are too few.

    Both files have users in their first column.
    """
    names = {str(uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    with contextlib.suppress(OSError):
        for line in Path(f"/etc/sub{kind}").read_text().splitlines():
            name, _, numbers = line.strip().partition(":")
            first, _, count = numbers.partition(":")
            if name not in names or not first.isdigit() or not count.isdigit():
                continue
            if int(count) >= _SUBORDINATE:
                return int(first)
    return 0


def _map_one(ids: dict[str, int]) -> None:
    """Root is the user and nobody else is anybody: all that the kernel gives without help."""
    Path("/proc/self/setgroups").write_text("deny")
    for kind, id in ids.items():
        Path(f"/proc/self/{kind}_map").write_text(f"0 {id} 1")


def _refused(error: OSError) -> str:
    """Why there is no user namespace, and the cure."""
    cure = "run pytest as root"
    if os.geteuid() == 0:
        cure = "give root CAP_SYS_ADMIN (in a container: docker run --privileged)"
    for path, wrong, value in (
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "1"),
        ("/proc/sys/user/max_user_namespaces", "0", "15000"),
    ):
        with contextlib.suppress(OSError):
            if Path(path).read_text().strip() == wrong:
                name = path.removeprefix("/proc/sys/").replace("/", ".")
                cure = f"sudo sysctl -w {name}={value}, or {cure}"
                break
    return (
        f"who lacks CAP_SYS_ADMIN needs a user namespace for containers: {error.strerror}; "
        f"{cure}, or skip these tests: --nsbox-unsupported=skip"
    )
