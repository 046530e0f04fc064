"""What a container has changed, listed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Container, ContainerDied, Session, Tmpfs

Make = Callable[..., Container]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small root filesystem of the test's own, seen inside with the host's tools."""
    root = tmp_path / "image"
    for name in ("data/old/deep", "etc", "bin"):
        (root / name).mkdir(parents=True)
    for name in ("data/keep", "data/gone", "data/old/one", "data/old/deep/two", "etc/hosts"):
        (root / name).write_text(f"{name} of the image\n")
    (root / "data/link").symlink_to("keep")
    busybox = Path("/bin/busybox")
    (root / "bin/busybox").write_bytes(busybox.read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "bin/sh").symlink_to("busybox")
    return root


def shell(container: Container, script: str) -> None:
    names = "cat chmod ln mkdir rm touch"
    busybox = "".join(f"alias {name}='busybox {name}'\n" for name in names.split())
    container.run(["/bin/busybox", "sh", "-ec", busybox + script], check=True)


def listed(container: Container) -> dict[str, str]:
    found = container.changes()
    assert [change.path for change in found] == sorted({change.path for change in found})
    return {change.path: change.kind for change in found}


@pytest.fixture(params=["memory", "disk"])
def small(request: pytest.FixtureRequest, nsbox_container_factory: Make, image: Path) -> Container:
    """Its writable layer is in memory or, as with a limit on memory, on disk."""
    limits: dict[str, Any] = {"memory": "64M"} if request.param == "disk" else {}
    return nsbox_container_factory(rootfs=image, **limits)


def test_a_container_that_wrote_nothing_has_changed_nothing(
    nsbox_container_factory: Make, image: Path
) -> None:
    extra = {"mounts": [Tmpfs("/new/mount"), Tmpfs("/data/mount")]}
    for spec in ({}, {"userns": True}, {"read_only": True}, extra):
        assert listed(nsbox_container_factory(**spec)) == {}, spec
    for spec in ({}, {"read_only": True}, {"memory": "64M"}, extra):
        assert listed(nsbox_container_factory(rootfs=image, **spec)) == {}, spec


def test_each_kind_of_change_to_an_image(small: Container) -> None:
    shell(
        small,
        """
        echo x >/data/new; mkdir -p /data/made/below; echo x >/data/made/below/file
        echo more >>/data/keep
        rm /data/gone
        rm -r /data/old
        """,
    )
    assert listed(small) == {
        "/data/gone": "deleted",
        "/data/keep": "changed",
        "/data/made": "added",
        "/data/made/below": "added",
        "/data/made/below/file": "added",
        "/data/new": "added",
        "/data/old": "deleted",
    }


def test_what_was_opened_to_be_written_and_left_as_it_was_is_no_change(small: Container) -> None:
    shell(small, ": >>/data/keep; chmod 600 /data/old/one; chmod 644 /data/old/one")
    assert listed(small) == {}


def test_the_same_size_and_time_do_not_hide_another_content(small: Container) -> None:
    shell(
        small,
        "cat /data/keep >/tmp/k; touch -r /data/keep /tmp/k;"
        "echo 'data/keep of the IMAGE' >/data/keep; touch -r /tmp/k /data/keep; rm /tmp/k",
    )
    assert listed(small) == {"/data/keep": "changed"}


def test_a_directory_is_changed_by_its_own_mode_and_not_by_what_is_in_it(
    small: Container,
) -> None:
    shell(small, "echo x >/data/old/deep/three; chmod 700 /data; chmod 700 /")
    assert listed(small) == {
        "/": "changed",
        "/data": "changed",
        "/data/old/deep/three": "added",
    }


def test_a_directory_made_anew_lacks_what_the_old_one_had(small: Container) -> None:
    shell(small, "rm -r /data/old; mkdir /data/old; mkdir /data/old/deep; echo x >/data/old/four")
    assert listed(small) == {
        "/data/old/deep/two": "deleted",
        "/data/old/four": "added",
        "/data/old/one": "deleted",
    }


def test_what_is_replaced_by_another_kind_is_changed(small: Container) -> None:
    shell(
        small,
        """
        rm /data/keep; mkdir /data/keep; echo x >/data/keep/in
        rm -r /data/old; echo x >/data/old
        rm /data/link; ln -s gone /data/link
        """,
    )
    assert listed(small) == {
        "/data/keep": "changed",
        "/data/keep/in": "added",
        "/data/link": "changed",
        "/data/old": "changed",
    }


def test_the_files_of_the_container_itself_count_when_the_test_has_changed_them(
    nsbox_container_factory: Make, image: Path
) -> None:
    one = nsbox_container_factory("one", rootfs=image)
    nsbox_container_factory("two", rootfs=image)  # a neighbour, whose name is written into hosts
    one.wait_until(lambda: "two" in one.read_text("/etc/hosts"))
    assert listed(one) == {}
    shell(one, "echo '10.1.2.3 other' >>/etc/hosts; echo x >/etc/hostname; rm /etc/resolv.conf")
    assert listed(one) == {"/etc/hosts": "changed", "/etc/hostname": "added"}


def test_tmp_and_run_are_counted_as_empty_at_the_start(small: Container) -> None:
    shell(small, "echo x >/tmp/file; mkdir /run/service; echo x >/dev/shm/none")
    assert listed(small) == {"/run/service": "added", "/tmp/file": "added"}


@pytest.mark.parametrize("spec", [{}, {"userns": True}, {"memory": "256M"}], ids=str)
def test_changes_to_the_hosts_root(nsbox_container_factory: Make, spec: dict[str, Any]) -> None:
    container = nsbox_container_factory(**spec)
    container.run(
        "echo x >/etc/passwd; rm /etc/group; mkdir /opt/tool /nsbox-new; echo x >/opt/tool/a",
        shell=True,
        check=True,
    )
    assert listed(container) == {
        "/etc/group": "deleted",
        "/etc/passwd": "changed",
        "/nsbox-new": "added",
        "/opt/tool": "added",
        "/opt/tool/a": "added",
    }


def test_a_filesystem_mounted_on_the_hosts_root_counts_too(
    nsbox_session: Session, tmp_path: Path
) -> None:
    """/tmp of the host is not the container's, so what is visible there has its own overlay."""
    (tmp_path / "file").write_text("x")
    with nsbox_session.container(visible=[str(tmp_path)]) as container:
        assert listed(container) == {}
        container.write_text(tmp_path / "file", "y")
        container.write_text(tmp_path / "more", "y")
        assert listed(container) == {f"{tmp_path}/file": "changed", f"{tmp_path}/more": "added"}


def test_a_change_deep_down_many_layers_is_told_against_all_of_them(
    nsbox_session: Session, image: Path, tmp_path: Path
) -> None:
    upper = tmp_path / "upper"
    (upper / "data/old").mkdir(parents=True)
    os.setxattr(upper / "data/old", "trusted.overlay.opaque", b"y")
    os.mknod(upper / "data/gone", 0o020000, 0)
    from pytest_nsbox import Rootfs

    rootfs = Rootfs(source="two layers", layers=(str(image), str(upper)))
    with nsbox_session.container(rootfs=rootfs) as container:
        shell(container, "echo x >/data/gone; echo x >/data/old/one; echo x >/data/keep")
        assert listed(container) == {
            "/data/gone": "added",
            "/data/old/one": "added",
            "/data/keep": "changed",
        }


def test_links_made_inside_are_never_followed(nsbox_container: Container, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("x")
    nsbox_container.run(["ln", "-s", tmp_path / "outside", "/opt/way"], check=True)
    assert listed(nsbox_container) == {"/opt/way": "added"}


def test_changes_are_told_after_a_kill_but_not_after_the_end(
    nsbox_session: Session,
) -> None:
    with nsbox_session.container() as container:
        container.write_text("/opt/file", "x")
        container.kill()
        assert listed(container) == {"/opt/file": "added"}
    with pytest.raises(ContainerDied, match="has been killed"):
        container.changes()


def test_thousands_of_long_and_odd_names_come_out(nsbox_container: Container) -> None:
    def make() -> None:
        deep = "/opt/deep"
        os.mkdir(deep)
        os.chdir(deep)
        for _ in range(600):
            os.mkdir("d")
            os.chdir("d")
        os.mkdir("/opt/many")
        for number in range(5000):
            Path(f"/opt/many/{'x' * 200}{number}").touch()
        Path(os.fsdecode(b"/opt/\xff\n")).touch()

    nsbox_container.call(make)
    found = listed(nsbox_container)
    assert len(found) == 5000 + 600 + 3
    assert found["/opt/deep" + "/d" * 600] == "added"
    assert found["/opt/\udcff\n"] == "added"
