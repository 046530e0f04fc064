"""Images made by the tools that everybody makes them with: umoci and skopeo."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_nsbox.launcher.envoy import run_to_its_end
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.rootfs import LayerCache, importer

OVERLAY = 'mount -t overlay overlay -o "lowerdir=$1" "$2" && cd "$2" && exec sh -c "$3"'
LISTING = "find . -printf '%P|%y|%m|%U|%G|%l|%n|%T@\\n' | LC_ALL=C sort"


def tool(*command: str | Path, cwd: Path | None = None) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.fail(f"these tests need the program {command[0]}: apt install it")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def resolve(source: str, cache: LayerCache) -> Rootfs:
    return importer.resolve(source, cache, run_to_its_end)


def in_overlay(layers: tuple[str, ...], mount_point: Path, script: str) -> str:
    """What a shell script says in the merged layers, in a mount namespace of its own."""
    mount_point.mkdir(exist_ok=True)
    lower = ":".join(reversed(layers)) if len(layers) > 1 else f"{mount_point}:{layers[0]}"
    return tool("unshare", "-m", "sh", "-c", OVERLAY, "sh", lower, mount_point, script)


def add_busybox(root: Path) -> Path:
    if not os.path.exists("/bin/busybox"):
        pytest.fail("these tests need /bin/busybox: apt install busybox-static")
    (root / "usr/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "usr/bin/busybox")
    (root / "usr/bin/sh").symlink_to("busybox")
    (root / "bin").symlink_to("usr/bin")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LayerCache]:
    cache = LayerCache(tmp_path / "cache")
    yield cache
    cache.close()


@pytest.fixture(scope="session")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_busybox(tmp_path_factory.mktemp("busybox") / "root")


@pytest.fixture(scope="session")
def busybox_tar(busybox_root: Path) -> Path:
    path = busybox_root.parent / "root.tar"
    tool("tar", "-C", busybox_root, "-cf", path, ".")
    return path


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with the image `v1`: three layers, whiteouts, an opaque directory."""
    work = tmp_path_factory.mktemp("umoci")
    tool("umoci", "init", "--layout", "oci", cwd=work)
    tool("umoci", "new", "--image", "oci:v1", cwd=work)
    tool("umoci", "unpack", "--image", "oci:v1", "bundle", cwd=work)
    root = add_busybox(work / "bundle/rootfs")
    for name in ("etc/gone", "etc/kept", "data/sub/one", "data/two", "opaque/old", "turned"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    os.link(root / "etc/kept", root / "etc/linked")
    os.mkfifo(root / "data/pipe", 0o640)
    os.chown(root / "data/two", 1234, 4321)
    (root / "data/two").chmod(0o6755)
    tool("umoci", "repack", "--refresh-bundle", "--image", "oci:v1", "bundle", cwd=work)

    (root / "etc/gone").unlink()
    shutil.rmtree(root / "data/sub")
    (root / "turned").unlink()
    (root / "turned").mkdir()
    (root / "turned/inside").write_text("was a file\n")
    tool("umoci", "repack", "--refresh-bundle", "--image", "oci:v1", "bundle", cwd=work)

    (work / "new").mkdir()
    (work / "new/new").write_text("new\n")
    tool("umoci", "insert", "--opaque", "--image", "oci:v1", "new", "/opaque", cwd=work)
    config = "--config.env=A=1 --config.env=B=x=y --config.workingdir=/data --config.user=7:8"
    command = "--config.entrypoint=/bin/sh --config.cmd=-c --config.cmd=true"
    tool("umoci", "config", "--image", "oci:v1", *config.split(), *command.split(), cwd=work)
    return work / "oci"


@pytest.fixture(scope="session")
def unpacked_by_umoci(layout: Path) -> Path:
    tool("umoci", "unpack", "--image", f"{layout}:v1", layout.parent / "reference")
    return layout.parent / "reference/rootfs"


@pytest.fixture(scope="session")
def oci_archive(layout: Path) -> Path:
    path = layout.parent / "oci.tar"
    tool("skopeo", "copy", f"oci:{layout}:v1", f"oci-archive:{path}:v1")
    return path


@pytest.fixture(scope="session")
def docker_archive(layout: Path) -> Path:
    path = layout.parent / "docker.tar"
    tool("skopeo", "copy", f"oci:{layout}:v1", f"docker-archive:{path}:example/app:v1")
    return path


Member = tuple[tarfile.TarInfo, bytes]
MakeTar = Callable[..., Path]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), 0o755
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


@pytest.fixture
def make_tar(tmp_path: Path) -> MakeTar:
    """Write an archive with just these members."""

    def make(*members: Member, name: str = "made.tar", mode: str = "w") -> Path:
        path = tmp_path / name
        with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            for info, data in members:
                archive.addfile(info, io.BytesIO(data))
        return path

    return make
