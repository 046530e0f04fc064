"""Images of umoci and skopeo, resolved and stacked."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.rootfs import LayerCache, merged
from tests.images import REGISTRY, as_a_registry

from .conftest import LISTING, MakeTar, in_overlay, member, resolve, tool

Images = dict[str, str]
REF_NAME = "org.opencontainers.image.ref.name"


@pytest.fixture
def images(layout: Path, oci_archive: Path, docker_archive: Path, tmp_path: Path) -> Images:
    """The one image in every form."""
    packed = tmp_path / "docker.tar.gz"
    with open(packed, "wb") as file:
        subprocess.run(["gzip", "-1c", docker_archive], stdout=file, check=True)
    return {
        "layout": str(layout),
        "layout, by name": f"{layout}#v1",
        "oci archive": str(oci_archive),
        "docker archive": str(docker_archive),
        "docker archive, by name": f"{docker_archive}#example/app:v1",
        "docker archive, gzip": str(packed),
        "through skopeo": f"oci:{layout}:v1",
    }


@pytest.fixture
def copied(layout: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(layout, tmp_path / "oci"))


def put(layout: Path, document: Any) -> dict[str, Any]:
    """Add a blob to a layout; returns its descriptor."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def manifest_of(layout: Path) -> Any:
    index = json.loads((layout / "index.json").read_text())
    return json.loads(blob(layout, index["manifests"][0]["digest"]).read_text())


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def set_index(layout: Path, *descriptors: dict[str, Any]) -> None:
    (layout / "index.json").write_text(json.dumps({"manifests": descriptors}))


def rewrite_archive(old: Path, new: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an archive of docker save, changing the content of its files (None: left out)."""
    import io

    with tarfile.open(old) as source, tarfile.open(new, "w") as target:
        for info in source:
            data = b""
            if info.isreg():
                file = source.extractfile(info)
                assert file is not None
                changed = change(info.name, file.read())
                if changed is None:
                    continue
                data, info.size = changed, len(changed)
            target.addfile(info, io.BytesIO(data))
    return new


def test_in_every_form_the_overlay_shows_what_umoci_unpacks(
    images: Images, cache: LayerCache, unpacked_by_umoci: Path, tmp_path: Path
) -> None:
    expected = tool("sh", "-c", LISTING, cwd=unpacked_by_umoci)
    assert "opaque/new" in expected
    assert "opaque/old" not in expected
    assert "etc/gone" not in expected
    stacks = set()
    for form, source in images.items():
        rootfs = resolve(source, cache)
        assert rootfs.source == source
        listing = in_overlay(rootfs.layers, tmp_path / "merged", LISTING)
        # Hard links and times of directories are the layers' own and no part of the comparison.
        assert comparable(listing) == comparable(expected), form
        stacks.add(rootfs.layers)
    assert len(stacks) == 1  # the layers are shared, whatever they came in
    assert len(cache.entries()) == 3


def comparable(listing: str) -> list[str]:
    lines = []
    for line in listing.splitlines():
        name, kind, mode, uid, gid, link, _, mtime = line.split("|")
        whole = mtime.partition(".")[0] if kind == "f" else ""
        if name:
            lines.append("|".join((name, kind, mode, uid, gid, link, whole)))
    return lines


def test_the_image_says_how_to_start_it(images: Images, cache: LayerCache) -> None:
    for form, source in images.items():
        rootfs = resolve(source, cache)
        assert rootfs.env.items() >= {"A": "1", "B": "x=y"}.items(), form
        assert (rootfs.cwd, rootfs.user) == ("/data", "7:8")
        assert rootfs.command == ("/bin/sh", "-c", "true")


def test_a_lookup_agrees_with_the_overlay(layout: Path, cache: LayerCache, tmp_path: Path) -> None:
    layers = resolve(str(layout), cache).layers
    paths = [
        "bin/sh",
        "etc/gone",
        "etc/kept",
        "data/sub",
        "data/sub/one",
        "data/two",
        "opaque/old",
        "opaque/new",
        "turned",
        "turned/inside",
        "bin/../etc/kept",
        "etc/kept/below",
        "nothing",
    ]
    script = f"for p in {' '.join(paths)}; do test -e $p && echo $p; done; true"
    there = in_overlay(layers, tmp_path / "merged", script).split()
    assert [path for path in paths if merged.resolve(layers, f"/{path}")[1]] == there
    assert "turned/inside" in there
    assert "opaque/old" not in there


def test_of_several_images_one_is_chosen_by_name(
    docker_archive: Path, tmp_path: Path, cache: LayerCache
) -> None:
    def twice(name: str, data: bytes) -> bytes:
        if name != "manifest.json":
            return data
        (image,) = json.loads(data)
        return json.dumps(
            [image, {**image, "RepoTags": ["registry.example/library/other:2"]}]
        ).encode()

    archive = rewrite_archive(docker_archive, tmp_path / "two.tar", twice)
    with pytest.raises(RootfsError, match=r"several images.*example/app:v1, .*other:2.*two\.tar#"):
        resolve(str(archive), cache)
    with pytest.raises(RootfsError, match="no image 'third' in it"):
        resolve(f"{archive}#third", cache)
    assert resolve(f"{archive}#other:2", cache).layers
    assert resolve(f"{archive}#registry.example:5000/example/app:v1", cache).layers


def test_of_several_names_in_a_layout_one_is_chosen(copied: Path, cache: LayerCache) -> None:
    tool("umoci", "tag", "--image", f"{copied}:v1", "v2")
    with pytest.raises(RootfsError, match=r"several images in it; it has v1, v2: choose one as"):
        resolve(str(copied), cache)
    assert resolve(f"{copied}#v2", cache).layers


def test_of_several_platforms_that_of_this_machine_is_taken(
    copied: Path, cache: LayerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = json.loads((copied / "index.json").read_text())["manifests"][0]
    here = {"os": "linux", "architecture": "amd64"}
    other = {"os": "linux", "architecture": "arm64"}
    broken = put(copied, {"not": "a manifest"})
    platforms = [{**broken, "platform": other}, {**real, "annotations": {}, "platform": here}]
    nested = put(copied, {"manifests": platforms})
    set_index(copied, {**nested, "annotations": {REF_NAME: "v1"}})
    uname = os.uname()
    for machine, outcome in (("x86_64", None), ("aarch64", "no layers"), ("s390x", "linux/s390x")):
        fields = (*uname[:4], machine)
        monkeypatch.setattr(os, "uname", lambda fields=fields: os.uname_result(fields))
        (copied / "index.json").touch()
        if outcome is None:
            assert len(resolve(str(copied), cache).layers) == 3
            cache.close()
            cache.prune()
        else:
            with pytest.raises(RootfsError, match=outcome):
                resolve(str(copied), cache)


def test_a_layer_with_another_digest_is_refused_and_not_kept(
    copied: Path, cache: LayerCache
) -> None:
    first = blob(copied, manifest_of(copied)["layers"][0]["digest"])
    tree = gzip.decompress(first.read_bytes())
    first.write_bytes(gzip.compress(tree, 1))
    with pytest.raises(RootfsError, match=f"{first.name}: its digest should be sha256"):
        resolve(str(copied), cache)
    assert cache.entries() == []
    assert os.listdir(cache.root / "layers") == []


def test_a_document_with_another_digest_is_refused(copied: Path, cache: LayerCache) -> None:
    config = blob(copied, manifest_of(copied)["config"]["digest"])
    config.write_text(config.read_text() + " ")
    with pytest.raises(RootfsError, match=f"{config.name}: its digest should be sha256"):
        resolve(str(copied), cache)


def test_a_docker_layer_with_another_content_is_refused(
    docker_archive: Path, tmp_path: Path, cache: LayerCache
) -> None:
    def flip(name: str, data: bytes) -> bytes:
        return data.replace(b"was a file", b"WAS A FILE") if name.endswith(".tar") else data

    archive = rewrite_archive(docker_archive, tmp_path / "flipped.tar", flip)
    with pytest.raises(RootfsError, match="its diff id should be sha256"):
        resolve(str(archive), cache)
    assert len(cache.entries()) == 1  # the layer below it, which is as it should be


def test_a_layer_may_be_named_by_a_link_to_it(
    docker_archive: Path, tmp_path: Path, cache: LayerCache
) -> None:
    with tarfile.open(docker_archive) as archive:
        links = {os.path.basename(m.linkname): m.name for m in archive if m.issym()}
    assert len(links) == 3

    def linked(name: str, data: bytes) -> bytes:
        if name != "manifest.json":
            return data
        (image,) = json.loads(data)
        image["Layers"] = [links[layer] for layer in image["Layers"]]
        return json.dumps([image]).encode()

    archive_of_links = rewrite_archive(docker_archive, tmp_path / "links.tar", linked)
    assert len(resolve(str(archive_of_links), cache).layers) == 3


def test_an_archive_without_one_of_its_layers_says_which(
    docker_archive: Path, tmp_path: Path, cache: LayerCache
) -> None:
    dropped: list[str] = []

    def drop(name: str, data: bytes) -> bytes | None:
        if name.endswith(".tar") and not dropped:
            dropped.append(name)
            return None
        return data

    archive = rewrite_archive(docker_archive, tmp_path / "less.tar", drop)
    with pytest.raises(RootfsError) as caught:
        resolve(str(archive), cache)
    assert f"{dropped[0]} is missing" in str(caught.value)


@pytest.mark.parametrize("manifest", ["{", '{"a": 1}', "[]", '[{"Config": 1, "Layers": []}]'])
def test_a_manifest_that_is_none_is_an_error_of_the_image(
    docker_archive: Path, tmp_path: Path, cache: LayerCache, manifest: str
) -> None:
    def spoil(name: str, data: bytes) -> bytes:
        return manifest.encode() if name == "manifest.json" else data

    archive = rewrite_archive(docker_archive, tmp_path / "bad.tar", spoil)
    with pytest.raises(RootfsError, match=r"image .*bad\.tar"):
        resolve(str(archive), cache)


def test_a_digest_is_no_way_to_another_file(copied: Path, cache: LayerCache) -> None:
    set_index(copied, {"digest": "sha256:../../../etc/passwd", "size": 1})
    with pytest.raises(RootfsError, match="not sha256:HEX"):
        resolve(str(copied), cache)


def test_layers_in_zstd_are_read_from_layout_and_archive(
    layout: Path, cache: LayerCache, tmp_path: Path
) -> None:
    zstd, archive = tmp_path / "zstd", tmp_path / "zstd.tar"
    shutil.copytree(layout, zstd)
    manifest = manifest_of(zstd)
    for descriptor in manifest["layers"]:
        packed = subprocess.run(
            ["zstd", "-c"],
            input=gzip.decompress(blob(zstd, descriptor["digest"]).read_bytes()),
            capture_output=True,
            check=True,
        ).stdout
        blob(zstd, descriptor["digest"]).unlink()
        descriptor |= put(zstd, packed)
        descriptor["mediaType"] = "application/vnd.oci.image.layer.v1.tar+zstd"
    set_index(zstd, put(zstd, manifest))
    tool("tar", "-C", zstd, "-cf", archive, ".")
    layers = resolve(str(archive), cache).layers
    assert resolve(str(layout), cache).layers == layers
    with LayerCacheAt(tmp_path / "second") as second:
        assert len(resolve(str(zstd), second).layers) == 3


class LayerCacheAt(LayerCache):
    def __enter__(self) -> LayerCacheAt:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def image_of(layout: Path, *layers: Path) -> str:
    """Make `layout` hold the image of just these tars."""
    diffs = [f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in layers]
    media = "application/vnd.oci.image.layer.v1.tar"
    manifest = {
        "config": put(layout, {"rootfs": {"diff_ids": diffs}}),
        "layers": [{**put(layout, path.read_bytes()), "mediaType": media} for path in layers],
    }
    set_index(layout, put(layout, manifest))
    return str(layout)


def test_one_layer_twice_in_an_image_is_stacked_once(
    copied: Path, make_tar: MakeTar, busybox_tar: Path, cache: LayerCache, tmp_path: Path
) -> None:
    again = make_tar(member("x", b"1"), name="again.tar")
    without = make_tar(member(".wh.x"), name="without.tar")
    rootfs = resolve(image_of(copied, busybox_tar, again, without, again), cache)
    assert len(rootfs.layers) == 3
    assert in_overlay(rootfs.layers, tmp_path / "merged", "cat x") == "1"


def test_an_opaque_root_hides_all_layers_below_it(
    copied: Path, make_tar: MakeTar, busybox_tar: Path, cache: LayerCache, tmp_path: Path
) -> None:
    below = make_tar(member("below"), name="below.tar")
    opaque = make_tar(member(".wh..wh..opq"), name="opaque.tar")
    rootfs = resolve(image_of(copied, below, opaque, busybox_tar), cache)
    assert in_overlay(rootfs.layers, tmp_path / "merged", "ls").split() == ["bin", "usr"]
    with pytest.raises(RootfsError, match="no /bin/sh"):
        resolve(image_of(copied, busybox_tar, opaque), cache)


def test_the_same_tar_as_layer_and_as_root_filesystem_are_two_things(
    copied: Path, busybox_root: Path, tmp_path: Path, cache: LayerCache
) -> None:
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra/.wh.x").touch()
    both = tmp_path / "both.tar"
    tool("tar", "-cf", both, "-C", busybox_root, ".", "-C", tmp_path / "extra", ".wh.x")
    (plain,) = resolve(str(both), cache).layers
    (layer,) = resolve(image_of(copied, both), cache).layers
    assert os.path.isfile(f"{plain}/.wh.x")
    assert not os.path.lexists(f"{layer}/.wh.x")


def commands(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_an_unchanged_image_is_copied_by_skopeo_once(
    layout: Path, cache: LayerCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = as_a_registry(layout, tmp_path / "path", monkeypatch)
    first = resolve(f"oci:{layout}:v1", cache)
    assert resolve(f"oci:{layout}:v1", cache) == first
    assert commands(log) == ["inspect", "copy", "inspect"]


def test_a_registry_is_asked_once_by_each_session(
    layout: Path, cache: LayerCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = as_a_registry(layout, tmp_path / "path", monkeypatch, "v1")
    first = resolve(REGISTRY, cache)
    assert resolve(REGISTRY, cache) == first
    assert commands(log) == ["inspect", "copy"]
    with closing(LayerCache(cache.root)) as of_another_session:
        assert resolve(REGISTRY, of_another_session) == first
    assert commands(log) == ["inspect", "copy", "inspect"]


def test_what_skopeo_complains_of_is_in_the_error(layout: Path, cache: LayerCache) -> None:
    with pytest.raises(RootfsError, match=r"skopeo inspect: .*no-such-tag"):
        resolve(f"oci:{layout}:no-such-tag", cache)
