"""From what the user wrote to the directories that are stacked."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from dataclasses import replace

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.rootfs import merged
from pytest_nsbox.rootfs.cache import Identity, LayerCache, name_of
from pytest_nsbox.rootfs.source import (
    Source,
    by_name,
    is_transport,
    kind_of,
    open_archive,
    require_skopeo,
    split,
)


def resolve(source: str, cache: LayerCache) -> Rootfs:
    """The root filesystem that `source` names, its layers unpacked in the cache.

    An archive that has been resolved before and has not changed is not read again. Raises
    `RootfsError` for a source that does not exist, cannot be read, or has no /bin/sh.
    """
    if is_transport(source):
        rootfs = _copied(source, cache)
    else:
        kind = by_name(source)
        if kind == "host":
            return Rootfs(source=source)
        if kind == "directory":
            rootfs = Rootfs(source=source, layers=(split(source).path,))
        else:
            rootfs = _imported(source, cache)
    _require_shell(rootfs)
    return rootfs


def _imported(source: str, cache: LayerCache) -> Rootfs:
    where = split(source)
    # Taken before the archive is read: if it changes meanwhile, the next resolve reads it again.
    identity = cache.identify(where)
    known = cache.recall(identity)
    if known is None:
        with cache.scratch(f"import-{name_of(identity.key)}"):
            known = cache.recall(identity)
            if known is None:
                known = _read(source, where, cache)
                cache.remember(identity, known)
    return replace(known, source=source)


def _read(source: str, where: Source, cache: LayerCache) -> Rootfs:
    kind = kind_of(source)
    if kind != "tar":
        from pytest_nsbox.rootfs.image import read_image

        return read_image(source, where, kind, cache)
    from pytest_nsbox.rootfs.unpack import unpack

    key = hashlib.sha256(repr(where).encode("utf-8", "surrogateescape")).hexdigest()
    with open_archive(where.path) as blob, cache.scratch(f"tar-{name_of(key)}") as part:
        digest = unpack(blob, str(part), whiteouts=False).plain
        # Another key than that of an image's layer, in which the same tar means something else.
        layer = hashlib.sha256(f"root filesystem {digest}".encode()).hexdigest()
        return Rootfs(source=source, layers=(cache.store(part, layer, where.path),))


def _copied(source: str, cache: LayerCache) -> Rootfs:
    """An image that skopeo copies, unless its manifest is the one that was copied before."""
    from pytest_nsbox.rootfs.image import read_image

    skopeo = require_skopeo(source)
    manifest = _run(source, [skopeo, "inspect", "--raw", source])
    digest = hashlib.sha256(manifest).hexdigest()
    key = hashlib.sha256(f"{source}\n{digest}".encode()).hexdigest()
    identity = Identity(key, (source, digest, 0, 0, 0, 0))
    if (known := cache.recall(identity)) is not None:
        return known
    with cache.scratch(f"skopeo-{name_of(key)}") as part:
        if (known := cache.recall(identity)) is not None:
            return known
        layout = str(part / "image")
        _run(source, [skopeo, "copy", "--quiet", source, f"oci:{layout}:it"])
        rootfs = read_image(source, Source(layout, "it"), "oci-layout", cache)
        cache.remember(identity, rootfs)
    return rootfs


def _run(source: str, command: list[str]) -> bytes:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else f"exit status {done.returncode}"
        raise RootfsError(f"rootfs {source!r}: {' '.join(command[:2])}: {why}")
    return done.stdout


def _require_shell(rootfs: Rootfs) -> None:
    try:
        path, file = merged.resolve(rootfs.layers, "/bin/sh")
        if file is None:
            link = path != "/bin/sh"
            why = f"it leads to {path}, not there" if link else f"{path} does not exist"
        else:
            mode = os.lstat(file).st_mode
            if stat.S_ISREG(mode) and mode & 0o111:
                return
            why = f"{path} is not an executable file"
    except OSError as error:
        why = f"follow it: {error.strerror}"
    top = os.path.basename(rootfs.source)
    raise RootfsError(
        f"rootfs {rootfs.source!r} has no /bin/sh: {why}; a container needs one to run commands:"
        f" take an image with a shell (debian, alpine, busybox), or check that {top!r}"
        " has the root directory at its top"
    )
