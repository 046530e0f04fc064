"""Files and trees into a container and out of it."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_nsbox import Bind, Container
from tests.test_changes import image as image  # a fixture

Make = Callable[..., Container]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A little of everything that can be copied."""
    root = tmp_path / "tree"
    (root / "sub/empty").mkdir(parents=True)
    (root / "run").write_text("#!/bin/sh\necho runs\n")
    (root / "sub/secret").write_bytes(bytes(range(256)) * 5000)
    (root / "sub/secret").chmod(0o600)
    (root / "sub").chmod(0o711)
    (root / "sub/link").symlink_to("secret")
    (root / "away").symlink_to("/etc/hostname")
    with open(root / "holes", "wb") as file:
        file.truncate(1 << 30)
        os.pwrite(file.fileno(), b"middle", 1 << 29)
    os.chown(root / "run", 1234, 1234)
    (root / "run").chmod(0o4750)  # after it: a change of the owner takes the set-uid bit
    os.utime(root / "run", ns=(1, 10**18 + 7))
    return root


def described(root: Path) -> dict[str, object]:
    """What a tree is made of."""
    found: dict[str, object] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = (status.st_size, path.read_bytes() if status.st_size < 1 << 21 else None)
        mode = stat.filemode(status.st_mode)
        found[str(path.relative_to(root))] = (mode, content, status.st_mtime_ns)
    return found


def test_a_tree_goes_in_and_comes_out_as_it_was(
    nsbox_container: Container, tree: Path, tmp_path: Path
) -> None:
    before = described(tree)
    assert nsbox_container.copy_in(tree, "/opt/made/copy") == []
    stat_of = ["stat", "-c", "%a %u:%g", "/opt/made/copy/run", "/opt/made/copy/sub"]
    assert nsbox_container.run(stat_of).stdout == "4750 0:0\n711 0:0\n"
    assert nsbox_container.run(["readlink", "/opt/made/copy/away"]).stdout == "/etc/hostname\n"
    assert nsbox_container.copy_out("/opt/made/copy", tmp_path / "back") == []
    after = described(tmp_path / "back")
    mode, *rest = before["run"]  # type: ignore[misc]
    assert mode == "-rwsr-x---"
    before["run"] = ("-rwxr-x---", *rest)  # the set-uid bit stays inside
    assert after == before
    assert (tmp_path / "back/holes").stat().st_blocks < 1000
    with open(tmp_path / "back/holes", "rb") as file:
        assert os.pread(file.fileno(), 6, 1 << 29) == b"middle"


def test_archive_keeps_the_owner(nsbox_container: Container, tree: Path, tmp_path: Path) -> None:
    nsbox_container.copy_in(tree / "run", "/opt/run", archive=True)
    assert nsbox_container.run(["stat", "-c", "%u:%g", "/opt/run"]).stdout == "1234:1234\n"
    nsbox_container.copy_out("/opt/run", tmp_path / "kept", archive=True)
    nsbox_container.copy_out("/opt/run", tmp_path / "mine")
    assert ((tmp_path / "kept").stat().st_uid, (tmp_path / "mine").stat().st_uid) == (1234, 0)
    assert (tmp_path / "kept").stat().st_mode & 0o7000 == 0


def test_where_a_copy_goes_is_as_docker_cp_has_it(
    nsbox_container: Container, tree: Path, tmp_path: Path
) -> None:
    """Into a directory that is there, or as what is not; `/.` is what is in a directory."""
    box = nsbox_container
    box.copy_in(tree, "/opt")
    assert box.read_text("/opt/tree/run").endswith("runs\n")
    box.copy_in(tree / "run", "/opt")
    box.copy_in(tree / "run", "/opt/other")
    box.copy_in(tree / "run", "/opt/new/")
    box.copy_in(f"{tree}/", "/opt/slash/")
    box.copy_in(f"{tree}/.", "/opt/content")
    box.copy_in(f"{tree}/sub/.", "/opt/content")
    for path in ("run", "other", "new/run", "slash/run", "content/run"):
        assert box.read_text(f"/opt/{path}").endswith("runs\n"), path
    assert not box.run(["test", "-f", "/opt/content/secret"]).returncode
    out = tmp_path / "out"
    out.mkdir()
    box.copy_out("/opt/tree/", out)
    box.copy_out("opt/tree/run", out / "deep/down/run")
    assert sorted(path.name for path in out.iterdir()) == ["deep", "tree"]
    assert (out / "deep/down/run").exists()


def test_a_copy_replaces_a_file_and_merges_with_a_directory(
    nsbox_container: Container, tree: Path, tmp_path: Path
) -> None:
    box = nsbox_container
    box.write_text("/opt/aim", "kept")
    box.run("ln -s aim /opt/run; mkdir /opt/tree; echo x >/opt/tree/own", shell=True, check=True)
    box.copy_in(tree / "run", "/opt/run")
    box.copy_in(tree, "/opt")
    assert box.read_text("/opt/aim") == "kept"  # a link is replaced, not written through
    assert box.read_text("/opt/run").endswith("runs\n")
    assert box.read_text("/opt/tree/own") == "x\n"
    with pytest.raises(NotADirectoryError):
        box.copy_in(tree, "/opt/run")
    box.run(["mkdir", "/opt/directory", "/opt/directory/run"], check=True)
    with pytest.raises(IsADirectoryError):
        box.copy_in(tree / "run", "/opt/directory")


def test_links_made_inside_do_not_lead_a_copy_out_of_its_place(
    nsbox_container: Container, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("the host's")
    box = nsbox_container
    box.run(
        f"mkdir -p /opt/evil/d; ln -s {secret} /opt/evil/link; ln -s {secret}/file /opt/evil/f;"
        "ln -s ../../../../../../../../etc/hostname /opt/evil/up; echo inside >/opt/evil/d/file",
        shell=True,
        check=True,
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "evil").mkdir()
    (out / "evil/d").symlink_to(secret)  # as an earlier copy may have left it
    with pytest.raises(NotADirectoryError):
        box.copy_out("/opt/evil", out)
    (out / "evil/d").unlink()
    box.copy_out("/opt/evil", out)
    assert os.readlink(out / "evil/link") == str(secret)
    assert (secret / "file").read_text() == "the host's"
    assert [path.name for path in secret.iterdir()] == ["file"]
    # a path of the container's is one of the container's, whatever is in it
    box.copy_out("/opt/../../../../../etc/hostname", tmp_path / "hostname")
    assert (tmp_path / "hostname").read_text() == box.hostname + "\n"
    box.run(["ln", "-s", "/etc", "/opt/way"], check=True)
    (tmp_path / "in").write_text("from outside")
    box.copy_in(tmp_path / "in", "/opt/way/nsbox-in")
    assert box.read_text("/etc/nsbox-in") == "from outside"
    assert not os.path.exists("/etc/nsbox-in")


def test_what_is_no_file_is_left_out_and_named(nsbox_container: Container, tmp_path: Path) -> None:
    box = nsbox_container
    tree = tmp_path / "special"
    tree.mkdir()
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (tree / "file").write_text("x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "socket"))
        left_out = box.copy_in(tree, "/opt")
    assert sorted(left_out) == [f"{tree}/{name}" for name in ("device", "fifo", "socket")]
    assert box.run(["ls", "/opt/special"]).stdout == "file\n"
    box.run(["mkfifo", "/opt/special/fifo"], check=True)
    assert box.copy_out("/opt/special", tmp_path / "out") == ["/opt/special/fifo"]
    with pytest.raises(OSError, match="FIFO"):
        box.copy_out("/opt/special/fifo", tmp_path / "fifo")
    assert not (tmp_path / "fifo").exists()


def test_what_is_not_there_is_an_error_of_the_usual_kind(
    nsbox_container: Container, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="/no/where"):
        nsbox_container.copy_out("/no/where", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        nsbox_container.copy_in(tmp_path / "missing", "/opt")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="/etc/hostname"):
        nsbox_container.copy_in(tmp_path / "file", "/etc/hostname/file")


def test_a_read_only_container_takes_nothing_in(
    nsbox_container_factory: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    container = nsbox_container_factory(read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        container.copy_in(tmp_path / "file", "/opt/file")
    container.copy_in(tmp_path / "file", "/tmp/file")
    assert container.read_text("/tmp/file") == "x"


def test_an_image_needs_no_program_for_it(
    nsbox_container_factory: Make, image: Path, tree: Path, tmp_path: Path
) -> None:
    container = nsbox_container_factory(rootfs=image)
    container.copy_in(tree, "/data")
    container.copy_out("/data", tmp_path / "data")
    assert (tmp_path / "data/tree/sub/secret").read_bytes() == bytes(range(256)) * 5000
    # files that the kernel makes up as they are read have no size, or one that is not theirs
    container.copy_out("/sys/class/net/lo/mtu", tmp_path / "mtu")
    assert (tmp_path / "mtu").read_text() == "65536\n"
    container.copy_out("/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_text().startswith("Linux version")


def test_a_directory_is_not_copied_into_itself(nsbox_container_factory: Make, tree: Path) -> None:
    container = nsbox_container_factory(mounts=[Bind(tree, "/opt/tree", read_only=False)])
    with pytest.raises(OSError, match="into itself"):
        container.copy_in(tree, "/opt/tree")
