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


def at_hand(source: str, cache: LayerCache, manifest: str | None = None) -> Rootfs | None:
    """The root filesystem that `source` names, its layers held by the cache; None where that takes
    more than a look. `manifest` is what `fetch` has found.

    Raises `RootfsError` for a source that does not exist or cannot be read, or has no /bin/sh.
    """
    if is_transport(source):
        digest = manifest or cache.manifests.get(source)
        if digest is None:
            return None
        found = _recall(source, _identity_of_copy(source, digest), cache)
        if found is not None and source.startswith(REGISTRY):
            # it is far away, and may count how often it is asked
            cache.manifests.setdefault(source, digest)
        return found
    kind = by_name(source)
    if kind == "host":
        return Rootfs(source=source)
    if kind == "directory":
        rootfs = Rootfs(source=source, layers=(split(source).path,))
        _require_shell(rootfs)
        return rootfs
    return _recall(source, cache.identify(split(source)), cache)


def fetch(source: str, cache: LayerCache, run: Run) -> str | None:
    """Have the layers of what is not at hand unpacked in the cache; of an image that skopeo copies
    it returns the digest of the manifest. `run` runs a command where registries can be reached, and
    returns what it wrote.

    An archive that has been unpacked before and has not changed is not read again. Raises
    `RootfsError` as `at_hand`.
    """
    if is_transport(source):
        return _copy(source, cache, run)
    where = split(source)
    # Taken before the archive is read: if it changes meanwhile, the next one reads it again.
    identity = cache.identify(where)
    if _recall(source, identity, cache) is None:
        with cache.scratch(f"import-{name_of(identity.key)}"):
            if _recall(source, identity, cache) is None:
                cache.remember(identity, _read(source, where, cache))
    return None


def resolve(source: str, cache: LayerCache, run: Run) -> Rootfs:
    """Both, one after the other: for who has nothing else to do meanwhile."""
    manifest = None
    while (found := at_hand(source, cache, manifest)) is None:
        manifest = fetch(source, cache, run)
    return found


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


def _identity_of_copy(source: str, digest: str) -> Identity:
    key = hashlib.sha256(f"{source}\n{digest}".encode()).hexdigest()
    return Identity(key, (source, digest, 0, 0, 0, 0))


def _copy(source: str, cache: LayerCache, run: Run) -> str:
    """Have skopeo copy an image, unless its manifest is the one that was copied before."""
    from pytest_nsbox.rootfs.image import read_image

    program = require_skopeo(source)

    def skopeo(command: str, *arguments: str) -> str:
        try:
            return run(program, command, *arguments)
        except SetupError as error:
            last = str(error).splitlines()[-1]
            raise RootfsError(f"rootfs {source!r}: {program} {command}: {last}") from None

    manifest = skopeo("inspect", "--raw", source)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    identity = _identity_of_copy(source, digest)
    if _recall(source, identity, cache) is not None:
        return digest
    with cache.scratch(f"skopeo-{name_of(identity.key)}") as part:
        if _recall(source, identity, cache) is None:
            layout = str(part / "image")
            skopeo("copy", "--quiet", source, f"oci:{layout}:it")
            rootfs = read_image(source, Source(layout, "it"), "oci-layout", cache)
            cache.remember(identity, rootfs)
    return digest


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
