"""Layers on disk: made once, shared, never half made, never taken from one who uses them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.rootfs import LayerCache

from .conftest import resolve, tool

RESOLVER = """
import sys
from pathlib import Path
from pytest_nsbox.rootfs import LayerCache, importer, resolve
from pytest_nsbox.rootfs import image, unpack
cache = LayerCache(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
done = []
def counted(*args, unpack=unpack.unpack, **more):
    done.append(1)
    return unpack(*args, **more)
unpack.unpack = image.unpack = counted
rootfs = resolve(sys.argv[2], cache, None)
print(len(done), *rootfs.layers, flush=True)
sys.stdin.readline()
"""
STOPPED = """
import os, signal, sys
from pathlib import Path
from pytest_nsbox.rootfs import LayerCache, extract, resolve
def stop(*_):
    print("unpacking", flush=True)
    signal.pause()
extract.Extraction._apply_whiteouts = stop
resolve(sys.argv[2], LayerCache(Path(sys.argv[1])), None)
"""


@contextmanager
def python(script: str, *args: str | Path) -> Iterator[tuple[IO[str], IO[str], int]]:
    """A process group of its own, and its standard input and output."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin
    assert process.stdout
    with process:
        try:
            yield process.stdin, process.stdout, process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("form", ["tar", "image"])
def test_two_processes_at_once_make_each_layer_once(
    busybox_tar: Path, docker_archive: Path, cache: LayerCache, form: str
) -> None:
    source = busybox_tar if form == "tar" else docker_archive
    with (
        python(RESOLVER, cache.root, source) as (in_a, out_a, _),
        python(RESOLVER, cache.root, source) as (in_b, out_b, _),
    ):
        for output in (out_a, out_b):
            assert output.readline() == "ready\n"
        for start in (in_a, in_b):
            print(file=start, flush=True)
        count_a, *layers_a = out_a.readline().split()
        count_b, *layers_b = out_b.readline().split()
    assert layers_a == layers_b
    assert int(count_a) + int(count_b) == len(layers_a) == (1 if form == "tar" else 3)
    assert len(cache.entries()) == len(layers_a)


def test_an_unchanged_archive_is_not_read_again(
    busybox_tar: Path, tmp_path: Path, cache: LayerCache
) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(busybox_tar.read_bytes())
    first = resolve(str(archive), cache)
    before = archive.stat()
    with open(archive, "r+b") as file:
        file.write(bytes(before.st_size))
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resolve(str(archive), cache) == first
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(RootfsError, match="the archive is empty"):
        resolve(str(archive), cache)


def test_an_archive_whose_layer_was_removed_is_unpacked_again(
    docker_archive: Path, cache: LayerCache
) -> None:
    first = resolve(str(docker_archive), cache)
    cache.close()
    assert cache.remove(os.path.basename(first.layers[1]))
    assert not os.path.exists(first.layers[1])
    assert resolve(str(docker_archive), cache) == first
    assert os.path.isdir(first.layers[1])


def test_a_layer_removed_without_asking_is_unpacked_again(
    docker_archive: Path, cache: LayerCache
) -> None:
    first = resolve(str(docker_archive), cache)
    assert resolve(str(docker_archive), cache) == first
    shutil.rmtree(first.layers[1])
    assert resolve(str(docker_archive), cache) == first
    assert os.path.isdir(first.layers[1])


def test_an_archive_without_a_shell_is_read_once_and_refused_each_time(
    busybox_tar: Path, tmp_path: Path, cache: LayerCache
) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(busybox_tar.read_bytes())
    tool("tar", "--delete", "-f", archive, "./usr/bin/sh")
    before = archive.stat()
    with pytest.raises(RootfsError, match="no /bin/sh"):
        resolve(str(archive), cache)
    with open(archive, "r+b") as file:
        file.write(bytes(before.st_size))
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(RootfsError, match="no /bin/sh"):
            resolve(str(archive), cache)


def test_what_is_used_again_and_again_is_noted_once_a_minute(
    busybox_tar: Path, cache: LayerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(str(busybox_tar), cache)
    assert resolve(str(busybox_tar), cache) == first
    (meta,) = (cache.root / "meta").iterdir()
    os.utime(meta, (1e9, 1e9))
    assert resolve(str(busybox_tar), cache) == first
    assert meta.stat().st_mtime == 1e9
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert resolve(str(busybox_tar), cache) == first
    assert meta.stat().st_mtime > 1e9


def test_the_same_root_from_two_archives_is_one_layer(
    busybox_tar: Path, tmp_path: Path, cache: LayerCache
) -> None:
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(subprocess.check_output(["gzip", "-1c", busybox_tar]))
    assert resolve(str(busybox_tar), cache).layers == resolve(str(packed), cache).layers


def test_names_are_short_and_closed_to_other_users(busybox_tar: Path, cache: LayerCache) -> None:
    (layer,) = resolve(str(busybox_tar), cache).layers
    assert len(os.path.basename(layer)) == 16
    assert stat.S_IMODE((cache.root / "layers").stat().st_mode) == 0o700
    assert stat.S_IMODE(os.stat(layer).st_mode) == 0o755


def test_a_failed_import_leaves_nothing(
    busybox_tar: Path, tmp_path: Path, cache: LayerCache
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(busybox_tar.read_bytes()[:500000])
    with pytest.raises(RootfsError, match=r"cut\.tar: entry './usr/bin/busybox'"):
        resolve(str(cut), cache)
    for folder in ("layers", "index", "meta"):
        assert os.listdir(cache.root / folder) == []


def test_what_a_killed_import_left_is_swept_by_the_next(
    busybox_tar: Path, docker_archive: Path, cache: LayerCache
) -> None:
    with python(STOPPED, cache.root, busybox_tar) as (_, output, pid):
        assert output.readline() == "unpacking\n"
        resolve(str(docker_archive), cache)
        parts = list((cache.root / "layers").glob("tar-*.part"))
        assert len(parts) == 1  # its lock is held: it is somebody's
        assert (parts[0] / "usr/bin/busybox").exists()
        assert len(cache.entries()) == 3  # and no layer yet
        os.killpg(pid, signal.SIGKILL)
        assert output.read() == ""  # both are dead, the child that unpacks too
    cache.close()
    cache.prune()
    resolve(str(docker_archive), cache)
    assert list((cache.root / "layers").glob("*.part")) == []


def test_a_layer_in_use_is_not_removed(busybox_tar: Path, cache: LayerCache) -> None:
    with python(RESOLVER, cache.root, busybox_tar) as (start, output, _):
        print(file=start, flush=True)
        assert output.readline() == "ready\n"
        _, layer = output.readline().split()
        name = os.path.basename(layer)
        assert not cache.remove(name)
        assert cache.prune() == []
        assert os.path.isdir(layer)
    assert cache.prune() == [name]
    assert os.listdir(cache.root / "layers") == []


def test_entries_tell_size_source_and_last_use(
    busybox_tar: Path, docker_archive: Path, cache: LayerCache
) -> None:
    resolve(str(docker_archive), cache)
    (layer,) = resolve(str(busybox_tar), cache).layers
    for meta in (cache.root / "meta").iterdir():
        os.utime(meta, (1e9, 1e9))
    with closing(LayerCache(cache.root)) as of_another_session:
        resolve(str(busybox_tar), of_another_session)
    *others, last = cache.entries()
    assert last.name == os.path.basename(layer)
    assert last.source == str(busybox_tar)
    assert last.last_used > 1e9
    assert {entry.last_used for entry in others} == {1e9}
    assert {entry.source for entry in others} == {str(docker_archive)}
    on_disk = int(tool("du", "-s", "--block-size=1", layer).split()[0])
    assert 0 <= on_disk - last.size <= 4096  # du counts the directory itself
    cache.close()
    assert sorted(cache.prune(unused_for=3600)) == sorted(entry.name for entry in others)


def test_two_layers_under_one_name_are_not_taken_for_each_other(
    busybox_tar: Path, tmp_path: Path, cache: LayerCache
) -> None:
    resolve(str(busybox_tar), cache)
    (meta,) = (cache.root / "meta").iterdir()
    meta.write_text(json.dumps({"key": "0" * 64, "source": "another"}))
    with (
        closing(LayerCache(cache.root)) as of_another_session,
        pytest.raises(RootfsError, match="two layers have one name"),
    ):
        resolve(str(busybox_tar), of_another_session)


@pytest.mark.parametrize("mark", [":", ",", "\\"])
def test_a_cache_that_an_overlay_could_not_name_is_refused(tmp_path: Path, mark: str) -> None:
    with pytest.raises(RootfsError, match="choose another directory"):
        LayerCache(tmp_path / f"a{mark}b")
