"""The plan of a container's file tree: which steps, in which order.

They are taken in the container's namespaces: by the launcher, which pays them a visit, or by init
where mounts have to be a user namespace's own. The first of them, the foundation, are the same for
so many containers that they can be taken before one is asked for.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import stat
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_nsbox.kernel.files import CopyEntry, LikeDir, MakeDir, MakeSymlink, OwnFile
from pytest_nsbox.kernel.libc import MS_NODEV, MS_NOSUID, MS_RDONLY
from pytest_nsbox.kernel.mountinfo import MountPoint, MountWatch
from pytest_nsbox.kernel.mounts import (
    EMPTY,
    BindMount,
    CopyFile,
    Mount,
    Overlay,
    PivotRoot,
    ReadOnly,
    Step,
    SubOverlay,
    TmpfsAt,
)
from pytest_nsbox.launcher import pseudo
from pytest_nsbox.launcher.pseudo import CGROUP, NEW, OLD
from pytest_nsbox.model.order import MountOrder, Order
from pytest_nsbox.model.place import Place

SCRATCH = "/tmp"  # covered, in the container's mount namespace only, by the tmpfs we work on
LAYER, RUN = "/layer", "/run"
DISK = "/disk"  # a link, as CGROUP is: so the steps are the same for all containers of a kind

# filesystems that are views of the kernel, not files: never copied into a container
KERNEL_FILESYSTEMS = frozenset(
    "autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs fusectl "
    "hugetlbfs mqueue nsfs proc pstore rpc_pipefs securityfs selinuxfs sysfs tracefs".split()
)
REPLACED = ("/proc", "/sys", "/dev", "/run", "/tmp")
OWN_FILES = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")  # container engines mount these
_NONE: list[MountPoint] = []
_ENGINES = ("/var/lib/docker", "/var/lib/containers", "/var/lib/containerd", "/snap")


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a container's file tree is built on: `layer` is the directory on disk that holds what it
    writes, without one it is written to memory, at most `size` bytes where that is given. `cgroups`
    are the directories of its own cgroup by the names of the controllers, by no name on v2; none
    where there are no cgroups."""

    layer: str | None
    size: int | None
    cgroups: Mapping[str, str]
    in_userns: bool  # mounts are made in a user namespace, the container's or one above
    cover: str | None = None  # an ordinary user's layer over the host's root

    @property
    def where(self) -> str:
        return DISK if self.layer else LAYER


@dataclass(frozen=True)
class Tree:
    """The steps from the host's root to the container's; the files of its own by their paths, and
    where they are, on the host or from the scratch filesystem on; where it can write, and what
    keeps that."""

    steps: list[Step]
    own_files: dict[str, str]
    places: list[Place]


class Planner:
    """Plans file trees. Most containers of a session are of one kind: what they share is kept."""

    def __init__(self) -> None:
        self._mounts = MountWatch()
        self._kind: tuple[object, ...] | None = None
        self._mounted: object = None
        self._tree = Tree([], {}, [])
        self._of: tuple[object, ...] | None = None
        self.latest: list[Step] = []  # foundation

    def foundation(self, order: Order, size: int | None, in_userns: bool) -> list[Step]:
        """The steps to what a file tree is built on, which is one for many; `size` as `Ground` has
        it."""
        of = (order.privileged, order.own_network, order.sysctls, size, in_userns)
        if of != self._of:
            self.latest = [*_scratch(order, size), *pseudo.all_of_it(order, in_userns)]
            self._of = of
        return self.latest

    def plan(self, order: Order, ground: Ground) -> Tree:
        mounted = _NONE if order.layers else self._mounts.now()
        # these two depend on what is in directories that anybody may write to at any time
        if ground.in_userns or order.frozen:
            tree = _tree(order, ground, mounted)
        else:
            kind = (_kind(order), ground.where, *ground.cgroups)
            if kind != self._kind or mounted is not self._mounted:
                self._tree = _tree(order, ground, mounted)
                self._kind, self._mounted = kind, mounted
            tree = self._tree
        places = [_on_disk(place, ground.layer) for place in tree.places]
        files = {name: _beside(path, ground.layer) for name, path in tree.own_files.items()}
        return Tree([*_links(ground), *tree.steps], files, places)


def _tree(order: Order, ground: Ground, mounted: list[MountPoint]) -> Tree:
    """All of it but for what is one container's alone."""
    steps = _steps(order, ground, mounted)
    own_files = {step.name: step.path for step in steps if isinstance(step, OwnFile)}
    return Tree(steps, own_files, [*_places(steps, order)])


def _on_disk(place: Place, layer: str | None) -> Place:
    if layer is None or not place.upper.startswith(DISK + "/"):
        return place
    return dataclasses.replace(place, upper=_beside(place.upper, layer), on_disk=True)


def _beside(path: str, layer: str | None) -> str:
    """Where the launcher finds what the steps call `path`."""
    if layer is not None and path.startswith(DISK + "/"):
        return layer + path.removeprefix(DISK)
    return path.lstrip("/")


# all of an order that the steps depend on
_kind = operator.attrgetter(
    "layers",
    "network",
    "own_network",
    "mounts",
    "read_only",
    "privileged",
    "passthrough",
    "visible",
    "brought",
)


def _steps(order: Order, ground: Ground, mounted: list[MountPoint]) -> list[Step]:
    where, in_userns = ground.where, ground.in_userns
    steps = [*_own_directories(where)]
    if in_userns and not order.layers:
        steps += _host_by_directory(mounted, where, order, ground.cover)
    else:
        steps += _one_overlay(order, where, in_userns)
    if not in_userns and not order.layers:
        steps += _other_filesystems(mounted, where, order)
    steps += pseudo.moved()
    steps += pseudo.cgroup([*ground.cgroups])
    seen = _seen(order, mounted if in_userns else _NONE)
    steps += _tmp_and_run(order, where, in_userns, seen)
    steps += _shown(order, where, in_userns, seen)
    steps += _elsewhere(order, where, in_userns, steps)
    if order.read_only:
        roots = [step.target for step in steps if isinstance(step, (Overlay, SubOverlay))]
        own = (NEW + "/tmp", NEW + "/run")
        read_only = [path for path in dict.fromkeys([NEW, *roots]) if path not in own]
        steps += [ReadOnly(path) for path in read_only]
    steps += [_user_mount(mount) for mount in order.mounts]
    steps.append(PivotRoot(NEW))
    return steps


def _places(steps: Iterable[Step], order: Order) -> Iterator[Place]:
    own = (DISK + "/", LAYER + "/", RUN)

    def place(target: str, upper: str, **more: Any) -> Place:
        return Place(target=target.removeprefix(NEW) or "/", upper=upper, on_disk=False, **more)

    for step in steps:
        if isinstance(step, Overlay):
            lower = tuple(path.removeprefix(OLD) or "/" for path in step.lower)
            yield place(step.target, step.upper, lower=lower, user=step.user)
        elif isinstance(step, SubOverlay):
            lower = tuple(path.removeprefix(OLD) for path in step.layers() if path != EMPTY)
            yield place(step.target, step.scratch + "/upper", lower=lower, user=step.user)
        elif isinstance(step, BindMount) and step.source.startswith(own):
            if step.target == NEW:
                lower = (*reversed(order.frozen.get("/", ())), "/")
                yield place(NEW, step.source, lower=lower, kind="made")
            else:
                yield place(step.target, step.source, kind="plain")


def _scratch(order: Order, size: int | None) -> Iterator[Step]:
    """Where it is built: a filesystem in memory that becomes the root until the tree is one."""
    limit = f",size={size}" if size else ""
    yield Mount("nsbox", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755" + limit)
    for directory in (OLD, NEW, LAYER, EMPTY, "/proc", "/sys", "/dev"):
        yield MakeDir(SCRATCH + directory)
    yield PivotRoot(SCRATCH, SCRATCH + OLD)
    if not order.privileged:
        yield from pseudo.bound(EMPTY, EMPTY, MS_RDONLY)


def _links(ground: Ground) -> Iterator[Step]:
    """To what is one container's alone."""
    if ground.layer:
        yield MakeSymlink(OLD + ground.layer, DISK)
    for controllers, path in ground.cgroups.items():
        yield MakeSymlink(OLD + path, CGROUP + controllers)


def _own_directories(where: str) -> Iterator[Step]:
    """/tmp and /run are not the image's; /tmp has the room that the writable layer has."""
    yield MakeDir(where + "/tmp", 0o1777)
    yield MakeDir(RUN)
    yield MakeDir(RUN + "/lock", 0o1777)


def _own_files(etc: str) -> Iterator[Step]:
    for name in OWN_FILES:
        yield OwnFile(etc + name.removeprefix("/etc"), name=name)


def _one_overlay(order: Order, where: str, in_userns: bool) -> Iterator[Step]:
    """The root is one overlay: the layers, or the host's root, below what is written."""
    upper = where + "/upper"
    layers = [*order.layers, *order.frozen.get("/", ())]
    yield LikeDir(upper, OLD + (layers[-1] if layers else ""))
    yield MakeDir(where + "/work")
    for name in REPLACED:
        if order.layers or not os.path.isdir(name):
            yield MakeDir(upper + name, 0o1777 if name == "/tmp" else 0o755)
    yield LikeDir(f"{upper}/etc", OLD + _top_with(layers, "/etc"))
    yield from _own_files(f"{upper}/etc")
    lower = [OLD + directory for directory in reversed(layers)]
    lower += [] if order.layers else [OLD]
    yield Overlay(tuple(lower), upper, where + "/work", NEW, in_userns)


def _frozen(order: Order, path: str) -> tuple[str, ...]:
    """What a snapshot has kept of a path, topmost first."""
    return tuple(OLD + directory for directory in reversed(order.frozen.get(path, ())))


def _tmp_and_run(order: Order, where: str, in_userns: bool, seen: Container[str]) -> Iterator[Step]:
    for path, upper, work in (
        ("/tmp", where + "/tmp", where + "/tmp.work"),
        ("/run", RUN, RUN + ".work"),
    ):
        if path in seen:
            continue
        frozen = _frozen(order, path)
        if frozen:
            yield MakeDir(work)
            yield Overlay(frozen, upper, work, NEW + path, in_userns)
        else:
            yield BindMount(upper, NEW + path, flags=MS_NOSUID | MS_NODEV)


def _elsewhere(order: Order, where: str, in_userns: bool, steps: Sequence[Step]) -> list[Step]:
    """What a snapshot has kept of a place that this container would not have of itself."""
    there = {getattr(step, "target", None) for step in steps}
    return [
        SubOverlay(
            OLD + path if os.path.isdir(path) and not order.layers else EMPTY,
            f"{where}/elsewhere{number}",
            NEW + path,
            in_userns,
            frozen=_frozen(order, path),
        )
        for number, path in enumerate(order.frozen)
        if path != "/" and NEW + path not in there
    ]


def _host_by_directory(
    mounts: Sequence[MountPoint],
    where: str,
    order: Order,
    cover: str | None,
) -> Iterator[Step]:
    """The host's root in a user namespace: an overlay for each top-level directory.

    There the mounts below / are locked to it, and a lower directory with such mounts below is
    refused; so where there are some, the directory is made anew and its entries are taken.
    """
    kernel = {mount.path for mount in mounts if mount.fstype in KERNEL_FILESYSTEMS}
    below = {parent for mount in mounts for parent in _parents(mount.path)}
    root = LAYER + "/root"
    yield MakeDir(root)  # not a tmpfs of its own, which would have a size of its own
    yield BindMount(root, NEW, flags=MS_NODEV)
    for name in REPLACED:
        yield MakeDir(NEW + name, 0o1777 if name == "/tmp" else 0o755)
    # not by the new root, which may become read-only before they are written
    etc = f"{root}/etc" if "/etc" in below else f"{where}/host/etc/upper"
    yield LikeDir(etc, OLD + "/etc")
    yield from _own_files(etc)
    kept = _kept(order, below)
    waiting = [f"/{name}" for name in sorted(os.listdir("/"))]
    while waiting:
        path = waiting.pop()
        if path in (*REPLACED, *OWN_FILES) or path in kernel or path in kept:
            continue
        if os.path.islink(path):
            yield MakeSymlink(os.readlink(path), NEW + path)
        elif not os.access(path, os.R_OK):
            # of root's own, which root inside is not: its directory is there, empty
            if os.path.isdir(path):
                yield LikeDir(NEW + path, OLD + path)
        elif path in below:
            yield LikeDir(NEW + path, OLD + path)
            waiting += [f"{path}/{name}" for name in sorted(os.listdir(path))]
        elif os.path.isdir(path):
            over = f"{cover}{path}" if cover and os.path.isdir(f"{cover}{path}") else None
            yield SubOverlay(
                OLD + path,
                f"{where}/host{path}",
                NEW + path,
                True,
                OLD + over if over else None,
                _frozen(order, path),
            )
        else:
            yield CopyFile(OLD + path, NEW + path)
    for path, source in kept.items():
        if source is not None and os.path.isdir(source) and not os.path.islink(source):
            frozen = (*_frozen(order, path), OLD + source)
            yield SubOverlay(EMPTY, f"{where}/host{path}", NEW + path, True, frozen=frozen)
        elif source is not None:
            yield CopyEntry(OLD + source, NEW + path)


def _kept(order: Order, below: Container[str]) -> dict[str, str | None]:
    """What a snapshot has of its own between the host's directories, and where; None for what
    was deleted there."""
    kept: dict[str, str | None] = {}
    for top in order.frozen.get("/", ()):
        waiting = [""]
        while waiting:
            directory = waiting.pop()
            for name in sorted(os.listdir(top + directory)):
                path = f"{directory}/{name}"
                found = os.lstat(top + path)
                if stat.S_ISDIR(found.st_mode) and path in below:
                    waiting.append(path)
                else:
                    gone = stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
                    kept[path] = None if gone else top + path
    return kept


def _parents(path: str) -> Iterator[str]:
    while path != "/":
        path = os.path.dirname(path)
        yield path


def _top_with(layers: Sequence[str], path: str) -> str:
    return next((top + path for top in reversed(layers) if os.path.isdir(top + path)), path)


def _other_filesystems(mounts: Sequence[MountPoint], where: str, order: Order) -> Iterator[Step]:
    by_path = {mount.path: mount for mount in mounts}
    for number, mount in enumerate(mounts):
        if mount.path == "/" or mount.fstype in KERNEL_FILESYSTEMS:
            continue
        if _below(mount.path, (*REPLACED, *_ENGINES, *OWN_FILES)):
            continue
        if not os.path.lexists(mount.path):  # another one has been mounted over it
            continue
        if mount.read_only:
            yield BindMount(OLD + mount.path, NEW + mount.path, read_only=True)
        elif not _is_there_anyway(mount, by_path):
            scratch, frozen = f"{where}/mount{number}", _frozen(order, mount.path)
            yield SubOverlay(OLD + mount.path, scratch, NEW + mount.path, frozen=frozen)


def _is_there_anyway(mount: MountPoint, mounts: Mapping[str, MountPoint]) -> bool:
    """Whether it shows what would be there without it, as what dockerd keeps is mounted."""
    above = next((mounts[path] for path in _parents(mount.path) if path in mounts), None)
    if above is None or above.id != mount.parent or above.read_only:
        return False
    root = above.root.rstrip("/") + mount.path.removeprefix(above.path.rstrip("/"))
    there = (mount.device, mount.root) == (above.device, root)
    return there and not (mount.idmapped or above.idmapped)


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def _seen(order: Order, locked: Iterable[MountPoint]) -> list[str]:
    """What of the host's /tmp and /run has to be seen all the same, copy-on-write. All of /tmp
    cannot where mounts below it are locked to it: no overlay has such a lower directory."""
    seen: list[str] = []
    refused = {parent for mount in locked for parent in _parents(mount.path)} & {*REPLACED}
    for path in sorted(() if order.layers else order.visible):
        shown = not _below(path, REPLACED) or _below(path, [*seen, *order.passthrough])
        if not shown and path not in refused:
            seen.append(path)
    return seen


def _shown(order: Order, where: str, in_userns: bool, seen: Iterable[str]) -> Iterator[Step]:
    """What is as it is elsewhere: what is seen, what was brought, what is passed through."""
    for number, path in enumerate(seen, 1):
        scratch = f"{where}/visible{number}"
        yield SubOverlay(OLD + path, scratch, NEW + path, in_userns, frozen=_frozen(order, path))
    for mount in order.brought:
        yield BindMount(f"{OLD}{mount.src}", NEW + mount.dst, read_only=True, recursive=True)
    for path in sorted(order.passthrough):
        yield BindMount(OLD + path, NEW + path, recursive=True)


def _user_mount(mount: MountOrder) -> Step:
    if mount.src is not None:
        return BindMount(OLD + mount.src, NEW + mount.dst, mount.read_only, recursive=True)
    size = f",size={mount.size}" if mount.size is not None else ""
    return TmpfsAt(NEW + mount.dst, "mode=1777" + size)
