"""What a source is taken for, and what is said of one that is nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.rootfs import LayerCache, check, kind_of

from .conftest import MakeTar, member, resolve, tool


def test_every_kind_of_source_is_told_apart(
    layout: Path, oci_archive: Path, docker_archive: Path, busybox_root: Path, busybox_tar: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    packed = tmp_path / "packed"
    both = tmp_path / "both.tar"
    packed.write_bytes(subprocess.check_output(["gzip", "-1c", docker_archive]))
    shutil.copy(docker_archive, both)
    tool("tar", "-rf", both, "-C", layout, "./oci-layout", "./index.json", "./blobs")
    odd = tmp_path / "with#mark"
    odd.symlink_to(busybox_root)
    sources = {
        "host": "host",
        "/": "host",
        str(busybox_root): "directory",
        str(odd): "directory",
        str(busybox_tar): "tar",
        str(docker_archive): "docker-archive",
        f"{docker_archive}#example/app:v1": "docker-archive",
        str(both): "docker-archive",
        str(packed): "docker-archive",
        str(oci_archive): "oci-archive",
        str(layout): "oci-layout",
        f"{layout}#v1": "oci-layout",
        "docker://alpine": "skopeo",
        "docker-daemon:app:latest": "skopeo",
        "dir:/somewhere": "skopeo",
    }
    assert {source: kind_of(source) for source in sources} == sources
    for source in sources:
        check(source)


def test_a_root_filesystem_may_have_a_manifest_of_its_own(make_tar: MakeTar) -> None:
    archive = make_tar(member("manifest.json"), member("oci-layout"), member("bin/sh"))
    assert kind_of(str(archive)) == "tar"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ("true", r"x does not exist; a root filesystem is 'host', a directory, a tar of one"),
        ("echo hello >x", "not a tar archive"),
        ("head -c 100000 /dev/urandom >x", "not a tar archive"),
        (": >x", "the file is empty"),
        ("mkdir x", "the directory .*x is empty"),
        ("mkfifo x", "neither a file nor a directory"),
        ("ln -s x x", "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_source_is_refused_at_collection(tmp_path: Path, make: str, says: str) -> None:
    subprocess.run(["sh", "-c", make], cwd=tmp_path, check=True)
    for function in (check, kind_of):
        with pytest.raises(RootfsError, match=says) as caught:
            function(f"{tmp_path}/x")
        assert str(caught.value).startswith("rootfs '")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ("echo hello | gzip >x", "not a tar archive"),
        ("tar -cf x -T /dev/null", "not a tar archive|the archive is empty"),
    ],
)
def test_what_only_reading_tells_is_refused_when_it_is_read(
    tmp_path: Path, make: str, says: str
) -> None:
    subprocess.run(["sh", "-c", make], cwd=tmp_path, check=True)
    with pytest.raises(RootfsError, match=says):
        kind_of(f"{tmp_path}/x")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "empty"),
        ("alpine:3", "docker://alpine:3"),
        ("ftp://host/x", "no such transport"),
        ("/usr#x", "leave out '#x'"),
    ],
)
def test_a_source_that_is_almost_right_is_put_right(source: str, says: str) -> None:
    with pytest.raises(RootfsError, match=says):
        check(source)


def test_a_choice_in_a_plain_tarball_is_refused(busybox_tar: Path) -> None:
    with pytest.raises(RootfsError, match="leave out '#v1'"):
        kind_of(f"{busybox_tar}#v1")


def test_without_skopeo_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RootfsError, match="apt install skopeo"):
        check("docker://alpine")


def test_an_old_tar_without_a_magic_is_an_archive(tmp_path: Path, busybox_root: Path) -> None:
    tool("tar", "--format=v7", "-cf", tmp_path / "v7", "-C", busybox_root, ".")
    check(str(tmp_path / "v7"))
    assert kind_of(str(tmp_path / "v7")) == "tar"


def test_the_host_has_no_layers(cache: LayerCache) -> None:
    assert resolve("host", cache).is_host
    assert not os.path.exists(cache.root)


def test_a_directory_is_used_where_it_is(busybox_root: Path, cache: LayerCache) -> None:
    assert resolve(str(busybox_root), cache).layers == (str(busybox_root),)
    assert not os.path.exists(cache.root)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ("mkdir etc", "/bin/sh does not exist"),
        ("mkdir -p usr/bin; ln -s usr/bin bin", "leads to /usr/bin/sh, not there"),
        ("mkdir bin; ln -s /bin/sh bin/sh", "Too many levels of symbolic links"),
        ("mkdir bin; : >bin/sh; chmod 644 bin/sh", "/bin/sh is not an executable file"),
        ("mkdir -p bin/sh", "/bin/sh is not an executable file"),
        # to what is there on the host, and is not in the container
        ("mkdir bin; ln -s /bin/bash bin/sh", "leads to /bin/bash, not there"),
        ("mkdir bin; ln -s ../../../../../../../../bin/bash bin/sh", "leads to /bin/bash, not"),
    ],
)
def test_a_root_without_a_shell_is_refused(
    tmp_path: Path, cache: LayerCache, make: str, says: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["sh", "-c", f"{make}; touch x"], cwd=root, check=True)
    with pytest.raises(RootfsError, match=rf"has no /bin/sh: .*{says}.*take an image with a shell"):
        resolve(str(root), cache)


def test_a_shell_by_an_absolute_link_is_found_in_the_root(
    tmp_path: Path, cache: LayerCache
) -> None:
    script = "mkdir -p opt/tools; cp /bin/busybox opt/tools/sh; ln -s /usr/../opt/tools bin"
    (tmp_path / "root").mkdir()
    subprocess.run(["sh", "-c", f"{script}; mkdir usr"], cwd=tmp_path / "root", check=True)
    assert resolve(str(tmp_path / "root"), cache).layers


def test_a_root_filesystem_crosses_a_socket_unchanged() -> None:
    rootfs = Rootfs(source="x", layers=("/a", "/b"), env={"A": "1"}, user="7", command=("sh",))
    assert Rootfs.from_wire(rootfs.to_wire()) == rootfs
    assert not rootfs.is_host
    assert isinstance(hash(rootfs), int)


def test_importing_costs_no_archive_modules() -> None:
    script = "import sys, pytest_nsbox.rootfs; print({'tarfile', 'lzma', 'bz2'} & set(sys.modules))"
    assert tool(sys.executable, "-c", script).strip() == "set()"
    assert tarfile.__name__ in sys.modules  # or the line above says nothing
