"""This Python, brought into a container on an image, so that a fork of this process can go on.

What it has loaded it has. What it may yet import, its files and their libraries, is shown at the
same paths, read-only, and what is started as a program gets on with the image's own libraries:
a layer below all of the image's has what the image lacks, and hides nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.model import elf
from pytest_nsbox.model.order import MountOrder
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.rootfs import LayerCache, merged
from pytest_nsbox.session.order import within

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container

LIBRARIES = "/run/nsbox"  # below it, the directories of this system's libraries
_SYSTEM = "/bin /boot /etc /lib /lib32 /lib64 /sbin /usr /usr/local /var".split()
_KERNELS = ("/dev", "/proc", "/sys")
_OWN = (*_KERNELS, "/run", "/tmp")  # not the image's in any container
# what comes with a C library fits that one only
_OF_GLIBC = frozenset(
    "libBrokenLocale.so.1 libanl.so.1 libc.so.6 libdl.so.2 libm.so.6 libmvec.so.1 libpthread.so.0 "
    "libresolv.so.2 librt.so.1 libthread_db.so.1 libutil.so.1".split()
)
_LOADED_LATER = ("libgcc_s.so.1",)  # by the C library itself, to end a thread


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What a container on one image is built with besides."""

    layer: str  # below those of the image
    mounts: tuple[MountOrder, ...]
    libraries: dict[str, str] = field(hash=False)  # name: path in the container

    def has(self, path: str) -> bool:
        return any(within(path, mount.dst) for mount in self.mounts)


def bring(rootfs: Rootfs, more: Iterable[str], cache: LayerCache) -> Brought:
    """Plan it for an image; `more` are further paths to show. Raises OSError."""
    shown = _outermost(filter(_to_be_shown, [*_of_this_python(), *more]))
    libraries = _libraries()
    needed = _needed(_programs(), libraries, shown)
    libraries = {**libraries, **needed}
    binds = [(os.path.realpath(path), path) for path in shown]
    for path in _outermost(map(os.path.dirname, libraries.values())):
        binds.append((path, LIBRARIES + path))
    below = _Below(rootfs.stack)
    for source, path in binds:
        below.mount_point(path, os.path.isdir(source))
    below.add_libraries(needed)
    return Brought(
        layer=below.store(cache),
        mounts=tuple(MountOrder(src=source, dst=below.resolve(path)) for source, path in binds),
        libraries={name: LIBRARIES + path for name, path in libraries.items()},
    )


# ---------------------------------------------------------------------- what there is


def _of_this_python() -> Iterator[str]:
    """Where it and all that it can import are."""
    yield from map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    yield from (sys.prefix, sys.base_prefix, *sys.path)
    for module in list(sys.modules.values()):
        with contextlib.suppress(Exception):  # what stands for a module may do anything
            # one that is already here may have parts that are not
            yield from list(getattr(module, "__path__", ()))
            yield getattr(module, "__file__", None) or ""
    for program in {sys.executable, getattr(sys, "_base_executable", sys.executable)}:
        yield from _links(program)


def _links(path: str) -> Iterator[str]:
    """A path and those that it leads to, link by link."""
    for _ in range(merged.LINKS):
        yield path
        if not os.path.islink(path):
            return
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))


def _to_be_shown(path: object) -> bool:
    """What an image has its own of, such as /usr, is never covered as a whole."""
    return (
        isinstance(path, str)
        and os.path.isabs(path)
        and os.path.normpath(path) not in ("/", *_SYSTEM, *_OWN)
        and not any(within(path, top) for top in _KERNELS)
    )


def _outermost(paths: Iterable[str]) -> list[str]:
    """Those that exist and that no other of them contains."""
    found: list[str] = []
    for path in sorted(set(map(os.path.normpath, paths)), key=lambda path: path.split("/")):
        if not (found and within(path, found[-1])) and os.path.exists(path):
            found.append(path)
    return found


def _libraries() -> dict[str, str]:
    """Where the loader of this process finds libraries by name (ld.so(8))."""
    found: dict[str, str] = {}
    for directory in filter(os.path.isdir, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        for name in os.listdir(directory):
            if ".so" in name:
                found.setdefault(name, os.path.join(directory, name))
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if ldconfig is not None:
        done = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            name, _, path = line.strip().partition(" => ")
            if path and _is_of_this_machine(path):
                found.setdefault(name.split(" ")[0], path)
    return {name: os.path.realpath(path) for name, path in found.items()}


@functools.cache
def _program() -> elf.Elf:
    found = elf.read(sys.executable)
    if found is None:
        raise UnsupportedError(f"this Python ({sys.executable}) is not a program of Linux")
    return found


def _is_of_this_machine(path: str) -> bool:
    found, own = elf.read(path), _program()
    return found is not None and (found.machine, found.bits) == (own.machine, own.bits)


def _programs() -> Iterator[str]:
    """This Python's program, and its extension modules."""
    yield os.path.realpath(sys.executable)
    places = [sysconfig.get_path(name) for name in ("platstdlib", "purelib", "platlib")]
    places.append(sysconfig.get_config_var("DESTSHARED") or places[0])
    for top in _outermost(places):
        for directory, _, names in os.walk(top):
            yield from (os.path.join(directory, name) for name in names if ".so" in name)


def _needed(
    files: Iterable[str], libraries: dict[str, str], shown: Sequence[str]
) -> dict[str, str]:
    """The libraries that files need, and those need, which are not among what is shown."""
    found = {name: libraries[name] for name in _LOADED_LATER if name in libraries}
    todo, seen = [*found.values(), *files], set[str]()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        read = elf.read(path) or _program()
        for name in read.needed:
            beside = [f"{place}/{name}" for place in read.search]
            own = next((path for path in beside if os.path.exists(path)), None)
            if own is not None and any(within(own, top) for top in shown):
                todo.append(own)
            elif name not in found and (library := own or libraries.get(name)):
                found[name] = os.path.realpath(library)
                todo.append(library)
    return found


# ---------------------------------------------------------------------- what the image lacks


class _Below:
    """The layer below those of an image: mount points, and links to libraries."""

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers
        self._entries: dict[str, str] = {}  # path: "/" for a directory, "" for a file, or a link

    def resolve(self, path: str) -> str:
        """Where a path leads in a container, the image's links and all."""
        if any(within(path, top) for top in _OWN):
            return path
        return merged.resolve(self._layers, path)[0]

    def _has(self, path: str) -> bool:
        return merged.resolve(self._layers, path)[1] is not None

    def mount_point(self, path: str, directory: bool) -> None:
        path = self.resolve(path)
        if not any(within(path, top) for top in _OWN) and not self._has(path):
            self._entries[path] = "/" if directory else ""

    def add_libraries(self, needed: dict[str, str]) -> None:
        """Those that the image lacks, where its loader looks for them. If it has not the loader
        that this Python asks for, ours is added, with all that it loads."""
        loader, c_library = _program().loader, needed.get("libc.so.6")
        if loader is None or c_library is None:
            return
        first = os.path.dirname(c_library).removeprefix("/usr")
        multiarch = sysconfig.get_config_var("MULTIARCH")
        places = list(dict.fromkeys([first, f"/lib/{multiarch}", "/lib64", "/lib"]))
        places += [f"/usr{place}" for place in places]
        if self._has(loader):
            target = next((place for place in places if self._has(f"{place}/libc.so.6")), None)
            needed = {name: path for name, path in needed.items() if name not in _OF_GLIBC}
        else:
            target, places = first, [first, f"/usr{first}"]
            self._entries[self.resolve(loader)] = LIBRARIES + os.path.realpath(loader)
        if target is None:
            return
        for name, path in needed.items():
            if not any(self._has(f"{place}/{name}") for place in places):
                self._entries[f"{self.resolve(target)}/{name}"] = LIBRARIES + path

    def store(self, cache: LayerCache) -> str:
        """The directory that has it all, kept among the layers of images."""
        text = json.dumps(self._entries, sort_keys=True)
        key = hashlib.sha256(f"below an image {text}".encode()).hexdigest()
        found = cache.get(key)
        if found is not None:
            return found
        with cache.scratch(f"below-{key[:16]}") as part:
            for path, what in self._entries.items():
                _make(Path(f"{part}{path}"), what)
            return cache.store(part, key, f"Python {sys.version.split()[0]} in {sys.prefix}")


def _make(path: Path, what: str) -> None:
    (path if what == "/" else path.parent).mkdir(parents=True, exist_ok=True)
    if what == "":
        path.touch()
    elif what != "/":
        path.symlink_to(what)


# ---------------------------------------------------------------------- whether it goes


def must_start(container: Container) -> None:
    """Try a program of the image, and this Python. Raises UnsupportedError."""
    rootfs = container.rootfs
    try:
        container.run(["/bin/sh", "-c", ":"], user=0, cwd="/")
    except OSError as error:
        raise UnsupportedError(
            f"rootfs {rootfs.source!r}: its /bin/sh does not start: {error.strerror}"
            + _foreign(rootfs)
        ) from None
    try:
        done = container.run([sys.executable, "-c", ""], user=0, cwd="/")
    except OSError as error:
        why = error.strerror or str(error)
    else:
        if not done.returncode:
            return
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise UnsupportedError(
        f"a test's body cannot run on rootfs {rootfs.source!r}: this Python ({sys.executable}) "
        f"does not start there: {why}; it needs {_c_library()} or a newer one: take an image with "
        "that, or with none at all in its place; or take nsbox_container, which needs no Python "
        "inside"
    )


def _c_library() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "its C library"
    except (ValueError, OSError):
        return "its C library"


def _foreign(rootfs: Rootfs) -> str:
    """Of the machine that an image is for, where it is another one."""
    file = merged.resolve(rootfs.stack, "/bin/sh")[1]
    found, own = None if file is None else elf.read(file), _program()
    if found is None or found.machine == own.machine:
        return ""
    names = [elf.MACHINES.get(one.machine, f"machine {one.machine}") for one in (found, own)]
    return (
        f"; it is a program for {names[0]}, and this machine is {names[1]}: take the image for it "
        f"(docker pull --platform, skopeo copy --override-arch)"
    )
