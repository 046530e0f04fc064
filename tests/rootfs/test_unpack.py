"""What one archive, honest or hostile, becomes on disk."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from pytest_nsbox.errors import RootfsError
from pytest_nsbox.rootfs import LayerCache
from pytest_nsbox.rootfs.stream import Blob
from pytest_nsbox.rootfs.unpack import Digests, unpack

from .conftest import MakeTar, member, resolve, tool

OPAQUE = "trusted.overlay.opaque"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    path = tmp_path / "layer"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "secret").write_text("secret")
    return path


def unpacked(archive: Path, into: Path, *, whiteouts: bool = False) -> Digests:
    with open(archive, "rb") as file:
        return unpack(Blob.of(file, str(archive)), str(into), whiteouts=whiteouts)


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.SYMTYPE, linkname=target)


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


@pytest.mark.parametrize("name", ["../outside/new", "a/../../outside/new", ".."])
def test_a_name_that_leads_out_of_the_root_is_refused(
    make_tar: MakeTar, into: Path, outside: Path, name: str
) -> None:
    with pytest.raises(RootfsError, match="leads out of the root filesystem") as caught:
        unpacked(make_tar(member(name, b"x")), into)
    assert name in str(caught.value)
    assert os.listdir(outside) == ["secret"]


def test_an_absolute_name_is_below_the_layer(make_tar: MakeTar, into: Path, outside: Path) -> None:
    unpacked(make_tar(member(f"{outside}/new", b"x")), into)
    assert os.listdir(outside) == ["secret"]
    assert (into / str(outside)[1:] / "new").read_text() == "x"


@pytest.mark.parametrize("climb", ["", "../../../../../../../.."])
def test_writing_through_a_symbolic_link_stays_in_the_layer(
    make_tar: MakeTar, into: Path, outside: Path, climb: str
) -> None:
    unpacked(make_tar(link("door", f"{climb}{outside}"), member("door/new", b"x")), into)
    assert os.listdir(outside) == ["secret"]
    assert (into / str(outside)[1:] / "new").read_text() == "x"


def test_a_file_replaces_a_symbolic_link_and_is_not_written_through_it(
    make_tar: MakeTar, into: Path
) -> None:
    unpacked(make_tar(member("real", b"1"), link("name", "real"), member("name", b"2")), into)
    assert (into / "real").read_text() == "1"
    assert not (into / "name").is_symlink()
    assert (into / "name").read_text() == "2"


def test_a_hard_link_to_a_file_outside_is_refused(
    make_tar: MakeTar, into: Path, outside: Path
) -> None:
    archive = make_tar(member("l", kind=tarfile.LNKTYPE, linkname=f"{outside}/secret"))
    with pytest.raises(RootfsError, match="entry 'l': No such file"):
        unpacked(archive, into)
    assert (outside / "secret").stat().st_nlink == 1


def test_device_nodes_are_left_out(make_tar: MakeTar, into: Path) -> None:
    unpacked(
        make_tar(
            member("disk", kind=tarfile.BLKTYPE, devmajor=8, devminor=0),
            member("zero", kind=tarfile.CHRTYPE, devmajor=0, devminor=0),
            member("file"),
        ),
        into,
    )
    assert os.listdir(into) == ["file"]


def test_of_two_entries_with_one_name_the_later_wins(make_tar: MakeTar, into: Path) -> None:
    unpacked(
        make_tar(
            member("a", kind=tarfile.DIRTYPE),
            member("a/b", b"1"),
            member("a", b"now a file"),
            member("c", b"1"),
            member("c", kind=tarfile.DIRTYPE),
            member("c/d", b"2"),
            member("e", b"1"),
            member("e", b"2"),
        ),
        into,
    )
    assert (into / "a").read_text() == "now a file"
    assert (into / "c/d").read_text() == "2"
    assert (into / "e").read_text() == "2"


@pytest.mark.parametrize(
    ("name", "why"), [("n" * 300, "File name too long"), ("d/" * 300 + "f", "directories deep")]
)
def test_a_name_too_long_or_too_deep_is_refused_by_name(
    make_tar: MakeTar, into: Path, name: str, why: str
) -> None:
    with pytest.raises(RootfsError, match=f"{name}.*{why}"):
        unpacked(make_tar(member(name)), into)


def test_an_archive_says_nothing_to_the_overlay_or_to_security_modules(
    make_tar: MakeTar, into: Path
) -> None:
    names = ["trusted.overlay.redirect", "user.overlay.opaque", "security.selinux", "user.mine"]
    headers = {f"SCHILY.xattr.{name}": "y" for name in names}
    unpacked(make_tar(member("d", kind=tarfile.DIRTYPE, pax_headers=headers)), into)
    assert os.listxattr(into / "d") == ["user.mine"]


def test_ownership_modes_times_links_and_attributes_come_back(tmp_path: Path, into: Path) -> None:
    root = tmp_path / "root"
    (root / "dir").mkdir(parents=True)
    (root / "dir/file").write_text("x")
    os.chown(root / "dir/file", 70000, 70001)
    (root / "dir/file").chmod(0o6751)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(root / "dir/file", "security.capability", capability)
    os.setxattr(root / "dir", "user.binary", b"\0\xff=\n")
    os.link(root / "dir/file", root / "hard")
    (root / "soft").symlink_to("/nowhere")
    os.lchown(root / "soft", 3, 4)
    os.mkfifo(root / "fifo", 0o600)
    with open(root / "sparse", "wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
    with open(os.fsencode(root) + b"/caf\xe9", "w"):
        pass
    (root / "dir").chmod(0o1000)
    for path in (root / "dir/file", root / "dir"):
        os.utime(path, (1e9, 1e9))
    root.chmod(0o711)
    archive = tmp_path / "a.tar"
    options = ["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "--numeric-owner"]
    tool("tar", "-C", root, *options, "-cf", archive, ".")
    unpacked(archive, into)

    script = "find . -printf '%P|%y|%m|%U|%G|%l|%n|%s|%Ts\\n' | LC_ALL=C sort"
    assert tool_bytes(script, into) == tool_bytes(script, root)
    assert os.getxattr(into / "dir/file", "security.capability") == capability
    assert os.getxattr(into / "dir", "user.binary") == b"\0\xff=\n"
    assert (into / "sparse").stat().st_blocks * 512 < 1 << 20
    assert (into / "sparse").read_bytes() == (root / "sparse").read_bytes()


def tool_bytes(script: str, cwd: Path) -> bytes:
    return subprocess.run(["sh", "-c", script], cwd=cwd, stdout=subprocess.PIPE, check=True).stdout


def test_a_file_that_tar_stored_twice_links_to_itself(tmp_path: Path, into: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "x").write_text("x")
    os.link(root / "x", root / "y")
    tool("tar", "-C", root, "-cf", tmp_path / "a.tar", "x", "x", "y")
    unpacked(tmp_path / "a.tar", into)
    assert (into / "x").read_text() == "x"
    assert (into / "x").stat().st_nlink == 2


@pytest.mark.parametrize("order", [1, -1])
def test_a_whiteout_hides_lower_layers_and_never_its_own(
    make_tar: MakeTar, into: Path, order: int
) -> None:
    members = [
        member(".wh.gone"),
        member("d/.wh.gone"),
        member(".wh.file"),
        member("file", b"new"),
        member(".wh.dir"),
        member("dir/new", b"new"),
        member("opaque/.wh..wh..opq"),
        member("opaque/new", b"new"),
        member(".wh..wh.plnk/1.2"),
    ]
    unpacked(make_tar(*members[::order]), into, whiteouts=True)
    assert sorted(os.listdir(into)) == ["d", "dir", "file", "gone", "opaque"]
    assert is_whiteout(into / "gone")
    assert is_whiteout(into / "d/gone")
    assert (into / "file").read_text() == "new"
    assert os.listdir(into / "dir") == ["new"]
    assert os.getxattr(into / "dir", OPAQUE) == b"y"  # the old one's content is not under it
    assert os.listdir(into / "opaque") == ["new"]
    assert os.getxattr(into / "opaque", OPAQUE) == b"y"
    assert os.listxattr(into / "d") == []


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh..."])
def test_a_whiteout_of_the_directory_it_is_in_or_above_is_refused(
    make_tar: MakeTar, into: Path, name: str
) -> None:
    with pytest.raises(RootfsError, match="names nothing"):
        unpacked(make_tar(member(name)), into, whiteouts=True)


def test_whiteout_names_are_files_like_others_in_a_root_filesystem(
    make_tar: MakeTar, into: Path
) -> None:
    unpacked(make_tar(member(".wh.x", b"1")), into)
    assert (into / ".wh.x").read_text() == "1"


@pytest.mark.parametrize("program", ["gzip", "bzip2", "xz", "zstd"])
def test_every_compression_is_told_by_its_bytes(
    busybox_tar: Path, tmp_path: Path, into: Path, program: str
) -> None:
    packed = tmp_path / "no-extension"
    packed.write_bytes(subprocess.check_output([program, "-1c", busybox_tar]))
    digests = unpacked(packed, into)
    assert digests.plain == tool("sha256sum", busybox_tar).split()[0]
    assert digests.raw in (tool("sha256sum", packed).split()[0], None)
    assert (into / "bin/sh").read_bytes() == Path("/bin/busybox").read_bytes()


def test_without_a_zstd_program_the_error_says_what_to_install(
    busybox_tar: Path, tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "a.tar.zst"
    packed.write_bytes(subprocess.check_output(["zstd", "-1c", busybox_tar]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pytest_nsbox.rootfs.stream._zstd_module", lambda: None)
    with pytest.raises(RootfsError, match="install the zstd program"):
        unpacked(packed, into)


@pytest.mark.parametrize("program", ["cat", "gzip", "bzip2", "xz", "zstd"])
def test_a_truncated_archive_names_itself_and_the_entry(
    busybox_tar: Path, tmp_path: Path, into: Path, program: str
) -> None:
    cut = tmp_path / "cut"
    whole = subprocess.check_output([program, busybox_tar, *(["-c"] * (program != "cat"))])
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RootfsError, match=r"cut: .*truncated or corrupt: make or download it"):
        unpacked(cut, into)
    if program in ("cat", "gzip"):
        with pytest.raises(RootfsError, match=r"entry '\./usr/bin/busybox'"):
            unpacked(cut, into)


def test_an_archive_cut_between_two_entries_is_truncated_too(make_tar: MakeTar, into: Path) -> None:
    archive = make_tar(member("a"), member("b"))
    os.truncate(archive, 512)
    with pytest.raises(RootfsError, match=r"entry 'a': bad header.*truncated"):
        unpacked(archive, into)


@pytest.mark.parametrize("size", [b"garbage!!!!!", b"\xff" * 11 + b"\x00"])
def test_a_damaged_header_is_an_error_and_not_the_end(
    make_tar: MakeTar, into: Path, size: bytes
) -> None:
    archive = make_tar(member("a"), member("b"), member("c"))
    data = bytearray(archive.read_bytes())
    data[512 + 124 : 512 + 136] = size
    data[512 + 148 : 512 + 156] = b" " * 8
    data[512 + 148 : 512 + 156] = b"%06o\0 " % sum(data[512:1024])
    archive.write_bytes(data)
    with pytest.raises(RootfsError, match="entry 'a': bad header"):
        unpacked(archive, into)


@pytest.mark.parametrize(("program", "at", "says"), [("gzip", -6, "CRC"), ("zstd", -1, "checksum")])
def test_a_flipped_bit_in_compressed_data_is_an_error(
    busybox_tar: Path, tmp_path: Path, into: Path, program: str, at: int, says: str
) -> None:
    packed = tmp_path / "packed"
    data = bytearray(subprocess.check_output([program, "-1c", busybox_tar]))
    data[at] ^= 1  # in the checksum at the end: every entry may have been written by then
    packed.write_bytes(data)
    with pytest.raises(RootfsError, match=f"{says}|truncated or corrupt"):
        unpacked(packed, into)


def test_nothing_is_written_where_the_layer_is_not_the_root_directory(
    make_tar: MakeTar, into: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_tar(member(f"{outside}/new", b"x"))  # harmless even if it were written
    monkeypatch.setattr(os, "chroot", lambda path: None)
    with pytest.raises(RootfsError, match="the layer did not become the root directory"):
        unpacked(archive, into)
    assert os.listdir(outside) == ["secret"]


def test_a_root_without_an_entry_of_its_own_is_open_to_all(
    make_tar: MakeTar, cache: LayerCache
) -> None:
    archive = make_tar(member("bin/sh", b"x"))
    before = os.umask(0o077)
    try:
        (layer,) = resolve(str(archive), cache).layers
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(layer).st_mode) == 0o755
    assert stat.S_IMODE(os.stat(f"{layer}/bin").st_mode) == 0o755


@pytest.mark.parametrize("program", ["gzip", "zstd"])
def test_what_follows_a_compressed_archive_is_an_error(
    busybox_tar: Path, tmp_path: Path, into: Path, program: str
) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(subprocess.check_output([program, "-1c", busybox_tar]) + b"garbage")
    with pytest.raises(RootfsError, match=r"packed: .*truncated or corrupt"):
        unpacked(packed, into)
