"""From what the user wrote to the directories that are stacked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import replace

from pytest_nsbox.errors import RootfsError, SetupError
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.rootfs import merged
from pytest_nsbox.rootfs.cache import Identity, LayerCache, name_of
from pytest_nsbox.rootfs.source import (
    REGISTRY,
    Source,
    by_name,
    is_transport,
    kind_of,
    open_archive,
    require_skopeo,
    split,
)

Run = Callable[..., str]


def resolve(source: str, cache: LayerCache, run: Run) -> Rootfs:
    """The root filesystem that `source` names, its layers unpacked in the cache.

    An archive that has been resolved before and has not changed is not read again. `run` runs a
    command where registries can be reached, and returns what it wrote. Raises
    `RootfsError` for a source that does not exist, cannot be read, or has no /bin/sh.
    """
    if is_transport(source):
        return _copied(source, cache, run)
    kind = by_name(source)
    if kind == "host":
        return Rootfs(source=source)
    if kind == "directory":
        rootfs = Rootfs(source=source, layers=(split(source).path,))
        _require_shell(rootfs)
        return rootfs
    return _imported(source, cache)


def _imported(source: str, cache: LayerCache) -> Rootfs:
    where = split(source)
    # Taken before the archive is read: if it changes meanwhile, the next resolve reads it again.
    identity = cache.identify(where)
    known = _recall(source, identity, cache)
    if known is None:
        with cache.scratch(f"import-{name_of(identity.key)}"):
            known = _recall(source, identity, cache)
            if known is None:
                known = _read(source, where, cache)
                cache.remember(identity, known)
                _require_shell(known)
    return known


def _recall(source: str, identity: Identity, cache: LayerCache) -> Rootfs | None:
    """What was resolved before, by whatever name; as usable as it was lately, or looked at."""

    def check(known: Rootfs) -> None:
        _require_shell(replace(known, source=source))

    known = cache.recall(identity, check)
    return None if known is None else replace(known, source=source)


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


def _copied(source: str, cache: LayerCache, run: Run) -> Rootfs:
    """An image that skopeo copies, unless its manifest is the one that was copied before. A
    registry is asked for that once, as it is far away and may count how often it is asked."""
    from pytest_nsbox.rootfs.image import read_image

    program = require_skopeo(source)

    def skopeo(command: str, *arguments: str) -> str:
        try:
            return run(program, command, *arguments)
        except SetupError as error:
            last = str(error).splitlines()[-1]
            raise RootfsError(f"rootfs {source!r}: {program} {command}: {last}") from None

    digest = cache.manifests.get(source)
    if digest is None:
        manifest = skopeo("inspect", "--raw", source)
        digest = hashlib.sha256(manifest.encode()).hexdigest()
        if source.startswith(REGISTRY):
            cache.manifests[source] = digest
    key = hashlib.sha256(f"{source}\n{digest}".encode()).hexdigest()
    identity = Identity(key, (source, digest, 0, 0, 0, 0))
    if (known := _recall(source, identity, cache)) is not None:
        return known
    with cache.scratch(f"skopeo-{name_of(key)}") as part:
        if (known := _recall(source, identity, cache)) is not None:
            return known
        layout = str(part / "image")
        skopeo("copy", "--quiet", source, f"oci:{layout}:it")
        rootfs = read_image(source, Source(layout, "it"), "oci-layout", cache)
        cache.remember(identity, rootfs)
        _require_shell(rootfs)
    return rootfs


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
