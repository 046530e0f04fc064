"""What the kernel shows of itself in a container: /proc, /sys, /dev; and what of it is hidden.

They are made where the container is built, before the rest of its tree, and moved into that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pytest_nsbox.kernel import userns
from pytest_nsbox.kernel.files import MakeDir, MakeSymlink
from pytest_nsbox.kernel.libc import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REMOUNT,
)
from pytest_nsbox.kernel.mounts import EMPTY, BindMount, Device, Mount, MoveMount, SetSysctl, Step
from pytest_nsbox.model.order import Order

OLD, NEW = "/oldroot", "/newroot"  # the host's root and the container's, while it is built
CGROUP = "/cgroup-"  # and controllers: a link to the container's own cgroup
_CGROUPS = "/cgroups"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_MASKED = (  # as the OCI runtimes' default configuration has it
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger")
_QUIET = MS_NOSUID | MS_NODEV | MS_NOEXEC


def all_of_it(order: Order, in_userns: bool) -> Iterator[Step]:
    yield from _dev()
    yield from _sys(order, in_userns)
    # init has mounted it: it shows the PID namespace of who mounts it (pid_namespaces(7))
    yield MoveMount(OLD + "/proc", "/proc")
    yield from _proc(order)


def _sys(order: Order, in_userns: bool) -> Iterator[Step]:
    if in_userns and not order.own_network:
        # it shows a network namespace, and that has to be of the user namespace (sysfs(5))
        yield BindMount(OLD + "/sys", "/sys", read_only=True, recursive=True)
    else:
        yield Mount("sysfs", "/sys", "sysfs", _QUIET | MS_RDONLY)
    yield from _covered(order, "/sys")


def _proc(order: Order) -> Iterator[Step]:
    if order.own_network:
        for name, value in (
            ("net.ipv4.ping_group_range", f"0 {min(userns.highest('gid'), 2147483647)}"),
            ("net.ipv4.ip_unprivileged_port_start", "0"),
        ):
            yield SetSysctl(name, value, optional=True)
    for name, value in order.sysctls.items():
        yield SetSysctl(name, value)
    yield from _covered(order, "/proc")
    if order.privileged:
        return
    for path in filter(os.path.lexists, (*_READ_ONLY, "/proc/sys")):
        yield from bound(path, path, MS_RDONLY)
    if order.own_network:  # then this is the container's, too, and stays writable
        yield from bound("/proc/sys/net", "/proc/sys/net", 0)


def moved() -> Iterator[Step]:
    """From where they were made to where the container has them."""
    for path in ("/proc", "/sys", "/dev"):
        yield MoveMount(path, NEW + path)


def cgroup(hierarchies: Sequence[str]) -> Iterator[Step]:
    """Its own cgroup, as programs read their limits from it (cgroup_namespaces(7)). `hierarchies`
    are the names of v1's, or one without a name on v2.

    Bound, not mounted: in a cgroup namespace each mount is a filesystem of its own, and to make
    one the kernel goes through those of all other containers.
    """
    root = NEW + "/sys/fs/cgroup"
    if hierarchies == [""]:
        yield from bound(CGROUP, root, MS_RDONLY)
    elif hierarchies:
        # no filesystem of its own: the kernel goes through all there are when a cgroup goes
        yield from (MakeDir(f"{_CGROUPS}/{controllers}") for controllers in hierarchies)
        yield Mount(_CGROUPS, root, None, MS_BIND)
        for controllers in hierarchies:
            yield from bound(CGROUP + controllers, f"{root}/{controllers}", MS_RDONLY)
        yield _remount(root, MS_RDONLY)


def _dev() -> Iterator[Step]:
    quiet = MS_NOSUID | MS_NOEXEC
    tty = ",mode=0620,gid=5" if userns.maps("gid", 5) else ",mode=0600"
    yield Mount("dev", "/dev", "tmpfs", MS_NOSUID, "mode=755,size=64k")
    devices = [*_DEVICES]
    if os.path.exists("/dev/net/tun"):
        yield MakeDir("/dev/net")
        devices.append("net/tun")
    for name in devices:
        found = os.stat(f"/dev/{name}")
        node = (found.st_mode, found.st_rdev, found.st_uid, found.st_gid)
        yield Device(f"{OLD}/dev/{name}", f"/dev/{name}", *node)
    # any other node that a test makes here must not be a way to the host's devices
    yield Mount("none", "/dev", None, MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV)
    yield MakeDir("/dev/pts")
    yield Mount("devpts", "/dev/pts", "devpts", quiet, "newinstance,ptmxmode=0666" + tty)
    yield MakeDir("/dev/shm")
    yield Mount("shm", "/dev/shm", "tmpfs", quiet | MS_NODEV, "mode=1777")
    yield MakeDir("/dev/mqueue")
    yield Mount("mqueue", "/dev/mqueue", "mqueue", quiet | MS_NODEV)
    yield MakeSymlink("pts/ptmx", "/dev/ptmx")
    yield MakeSymlink("/proc/self/fd", "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        yield MakeSymlink(f"/proc/self/fd/{number}", f"/dev/{name}")


def _covered(order: Order, top: str) -> Iterator[Step]:
    """What of the kernel a test has no business with."""
    for path in () if order.privileged else _MASKED:
        if path.startswith(top) and os.path.lexists(path):
            cover = EMPTY if os.path.isdir(path) else "/dev/null"
            yield Mount(cover, path, None, MS_BIND)


def bound(source: str, target: str, flags: int) -> Iterator[Step]:
    """A bind mount takes its flags in a second call (mount(2))."""
    yield Mount(source, target, None, MS_BIND)
    yield _remount(target, flags)


def _remount(target: str, flags: int) -> Step:
    return Mount("none", target, None, MS_BIND | MS_REMOUNT | _QUIET | flags)
