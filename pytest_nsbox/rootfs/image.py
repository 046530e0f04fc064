"""Images: what `docker save` writes, and OCI archives and layouts (OCI image spec 1.1)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.rootfs import merged
from pytest_nsbox.rootfs.cache import LayerCache, name_of
from pytest_nsbox.rootfs.source import Kind, Source
from pytest_nsbox.rootfs.store import Store, archive_store, directory_store
from pytest_nsbox.rootfs.stream import BROKEN, Blob
from pytest_nsbox.rootfs.unpack import unpack

Json = dict[str, Any]
DOCUMENT = 16 << 20  # more than any manifest
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
REF_NAME = "org.opencontainers.image.ref.name"
# uname(2)'s names and Go's
ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "loongarch64": "loong64",
}


@dataclass(frozen=True)
class _Layer:
    blob: Blob
    diff_id: str  # sha256 of the tar
    digest: str | None  # sha256 of the blob, where the manifest says


def read_image(source: str, where: Source, kind: Kind, cache: LayerCache) -> Rootfs:
    """Import the image at `where` into the cache."""
    with ExitStack() as stack:
        if kind == "oci-layout":
            store = stack.enter_context(directory_store(where.path))
        else:
            store = stack.enter_context(archive_store(where.path, cache))
        try:
            read = _docker if kind == "docker-archive" else _oci
            config, layers = read(store, where.choice)
        except (AttributeError, KeyError, TypeError) as error:
            raise RootfsError(
                f"image {store.label}: its manifest is not one ({error!r}); {BROKEN}"
            ) from error
        directories = [_import(layer, cache, where.path) for layer in layers]
    return _rootfs(source, config.get("config") or {}, directories)


def _rootfs(source: str, run: Json, layers: list[str]) -> Rootfs:
    return Rootfs(
        source=source,
        layers=_stack(layers),
        env=dict(item.split("=", 1) for item in run.get("Env") or () if "=" in item),
        cwd=run.get("WorkingDir") or None,
        user=run.get("User") or None,
        command=(*(run.get("Entrypoint") or ()), *(run.get("Cmd") or ())),
    )


def _stack(layers: list[str]) -> tuple[str, ...]:
    """What the overlay needs of them, lowest first.

    It refuses one directory twice (ELOOP), of which the upper hides all of the lower; and it does
    not look for the opaque mark on a root.
    """
    kept: list[str] = []
    for layer in reversed(layers):
        if layer not in kept:
            kept.append(layer)
        if merged.is_opaque(layer):
            break
    return tuple(reversed(kept))


def _import(layer: _Layer, cache: LayerCache, source: str) -> str:
    if found := cache.get(layer.diff_id):
        return found
    with cache.scratch(name_of(layer.diff_id)) as part:
        if found := cache.get(layer.diff_id):
            return found
        digests = unpack(layer.blob, str(part), whiteouts=True)
        for name, said, got in (
            ("digest", layer.digest, digests.raw),
            ("diff id", layer.diff_id, digests.plain),
        ):
            if said and got and said != got:
                raise _mismatch(layer.blob.label, name, said, got)
        return cache.store(part, layer.diff_id, source)


# docker save


def _docker(store: Store, choice: str | None) -> tuple[Json, list[_Layer]]:
    images = _document(store, "manifest.json", list)
    names = [tag for image in images for tag in image.get("RepoTags") or ()]
    if choice:
        chosen = [
            image
            for image in images
            if _familiar(choice) in map(_familiar, image.get("RepoTags") or ())
        ]
    else:
        chosen = images
    if len(chosen) != 1:
        raise _choose(store, choice, names)
    image = chosen[0]
    config = _document(store, image["Config"], dict)
    diff_ids = _diff_ids(store, config)
    if len(diff_ids) != len(image["Layers"]):
        raise RootfsError(
            f"image {store.label}: {len(image['Layers'])} layers in its manifest,"
            f" {len(diff_ids)} in its config; {BROKEN}"
        )
    blobs = [_need(store, name) for name in image["Layers"]]
    return config, [_Layer(blob, diff, None) for blob, diff in zip(blobs, diff_ids, strict=True)]


def _familiar(tag: str) -> str:
    """A tag in its short form, without the registry: `alpine` is `HOST/library/alpine:latest`."""
    host, slash, path = tag.partition("/")
    if slash and ("." in host or ":" in host):
        tag = path
    tag = tag.removeprefix("library/")
    return tag if ":" in tag.rpartition("/")[2] else f"{tag}:latest"


# OCI


def _oci(store: Store, choice: str | None) -> tuple[Json, list[_Layer]]:
    manifest = _select(store, _document(store, "index.json", dict)["manifests"], choice)
    for _ in range(5):  # an index may hold indices
        if "manifests" not in manifest:
            break
        manifest = _select(store, manifest["manifests"], None)
    if "layers" not in manifest or "config" not in manifest:
        raise RootfsError(f"image {store.label}: its manifest has no layers: not a container image")
    config = _verified(store, manifest["config"])
    layers = []
    for descriptor, diff_id in zip(
        manifest["layers"], _diff_ids(store, config, len(manifest["layers"])), strict=True
    ):
        media_type = descriptor.get("mediaType", "")
        if "encrypted" in media_type or "tar" not in media_type:
            raise RootfsError(
                f"image {store.label}: a layer has the media type {media_type!r}, and only tar,"
                " tar+gzip and tar+zstd can be read"
            )
        blob, digest = _blob(store, descriptor)
        layers.append(_Layer(blob, diff_id, digest))
    return config, layers


def _select(store: Store, descriptors: list[Json], choice: str | None) -> Json:
    """The one manifest, or the one of that name, or the one for this machine."""
    found = [item for item in descriptors if not choice or choice in _names(item)]
    if len(found) > 1 and len({_names(item) for item in found}) == 1:
        platforms = [item.get("platform") or {} for item in found]
        here = os.uname().machine
        wanted = ("linux", ARCHITECTURES.get(here, here))
        found = [
            item
            for item, platform in zip(found, platforms, strict=True)
            if (platform.get("os"), platform.get("architecture")) == wanted
        ]
        if not found:
            have = sorted({f"{p.get('os')}/{p.get('architecture')}" for p in platforms})
            raise RootfsError(
                f"image {store.label}: it is for {', '.join(have)} and this machine is"
                f" {'/'.join(wanted)}"
            )
        del found[1:]  # variants of one architecture: the first is preferred, says the spec
    if len(found) != 1:
        raise _choose(store, choice, [name for item in descriptors for name in _names(item)[:1]])
    return _verified(store, found[0])


def _names(descriptor: Json) -> tuple[str, ...]:
    notes = descriptor.get("annotations") or {}
    return tuple(notes[key] for key in (REF_NAME, "io.containerd.image.name") if key in notes)


# documents and digests


def _document(store: Store, name: str, kind: type[Any], blob: Blob | None = None) -> Any:
    try:
        value = json.loads((blob or _need(store, name)).read(DOCUMENT))
    except ValueError as error:
        raise RootfsError(f"image {store.label}: {name}: not JSON ({error}); {BROKEN}") from None
    if not isinstance(value, kind):
        raise RootfsError(f"image {store.label}: {name}: not what it should be; {BROKEN}")
    return value


def _need(store: Store, name: str) -> Blob:
    blob = store.blob(name)
    if blob is None:
        raise RootfsError(f"image {store.label}: {name} is missing from it; {BROKEN}")
    return blob


def _blob(store: Store, descriptor: Json) -> tuple[Blob, str]:
    digest = _hex(store, descriptor["digest"])
    return _need(store, f"blobs/sha256/{digest}"), digest


def _verified(store: Store, descriptor: Json) -> Json:
    blob, digest = _blob(store, descriptor)
    got = hashlib.sha256(blob.read(DOCUMENT)).hexdigest()
    if got != digest:
        raise _mismatch(blob.label, "digest", digest, got)
    value: Json = _document(store, blob.label, dict, blob)
    return value


def _diff_ids(store: Store, config: Json, count: int | None = None) -> list[str]:
    ids = [_hex(store, item) for item in (config.get("rootfs") or {}).get("diff_ids") or ()]
    if count is not None and len(ids) != count:
        raise RootfsError(
            f"image {store.label}: {count} layers in its manifest, {len(ids)} in its config;"
            " not a container image, or a broken one"
        )
    return ids


def _hex(store: Store, digest: str) -> str:
    match = DIGEST.fullmatch(digest)
    if match is None:
        raise RootfsError(f"image {store.label}: digest {digest!r}: not sha256:HEX")
    return match[1]


def _mismatch(label: str, name: str, said: str, got: str) -> RootfsError:
    return RootfsError(
        f"image {label}: its {name} should be sha256:{said} and is sha256:{got}; {BROKEN}"
    )


def _choose(store: Store, choice: str | None, names: list[str]) -> RootfsError:
    said = f"no image {choice!r} in it" if choice else "several images in it"
    have = ", ".join(names) or "none with a name"
    how = f": choose one as {store.label}#{names[0]}" if names else ""
    return RootfsError(f"image {store.label}: {said}; it has {have}{how}")
