"""Where a container's files come from, and where they go: nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Bind, Container, Tmpfs
from tests.conftest import tool
from tests.images import REGISTRY, Images, as_a_registry

SOURCES = ["tree", "tarball", "docker_archive", "oci_archive", "oci_layout"]


def test_the_hosts_root_is_there_copy_on_write(nsbox_container: Container) -> None:
    assert (
        nsbox_container.read_text("/etc/debian_version") == Path("/etc/debian_version").read_text()
    )
    assert nsbox_container.run([sys.executable, "-c", "import pytest_nsbox"]).returncode == 0
    nsbox_container.write_text("/etc/debian_version", "changed")
    nsbox_container.write_text("/etc/nsbox-was-here", "new")
    nsbox_container.run(["rm", "-r", "/usr/share/doc"], check=True)
    assert nsbox_container.read_text("/etc/debian_version") == "changed"
    assert Path("/etc/debian_version").read_text() != "changed"
    assert not os.path.exists("/etc/nsbox-was-here")
    assert os.path.isdir("/usr/share/doc")


def test_no_container_sees_what_another_has_written(nsbox_container_factory: Any) -> None:
    a, b = nsbox_container_factory(), nsbox_container_factory()
    a.write_text("/etc/mine", "a")
    with pytest.raises(FileNotFoundError):
        b.read_text("/etc/mine")


def test_other_filesystems_of_the_host_show_copy_on_write(pytester: pytest.Pytester) -> None:
    """One is mounted for the occasion, in a mount namespace made for it."""
    mounted = pytester.mkdir("mounted")
    pytester.makepyfile(
        f"""
        import pathlib
        FILE = pathlib.Path("{mounted}/sub/file")

        def test_it(nsbox_container):
            assert FILE.read_text() == "on the tmpfs\\n"
            assert nsbox_container.read_text("/opt/nsbox-test/sub/file") == "on the tmpfs\\n"
            nsbox_container.write_text("/opt/nsbox-test/sub/file", "changed")
            nsbox_container.write_text("/opt/nsbox-test/sub/new", "new")
            assert nsbox_container.read_text("/opt/nsbox-test/sub/file") == "changed"
            assert FILE.read_text() == "on the tmpfs\\n"
            assert not (FILE.parent / "new").exists()

        def test_one_that_another_hides_stays_hidden(nsbox_container):
            assert nsbox_container.run(["ls", "/srv"]).stdout == "top\\n"

        def test_read_only(nsbox_container_factory):
            container = nsbox_container_factory(read_only=True)
            done = container.run(["touch", "/opt/nsbox-test/sub/new"])
            assert "Read-only" in done.stderr
        """
    )
    script = f"""
        set -e
        mount -t tmpfs opt /opt; mkdir /opt/nsbox-test
        mount -t tmpfs other {mounted}; mkdir {mounted}/sub; echo on the tmpfs > {mounted}/sub/file
        mount --bind {mounted} /opt/nsbox-test
        mount -t tmpfs a /srv; mkdir /srv/below; mount -t tmpfs b /srv/below
        mount -t tmpfs c /srv; touch /srv/top
        cd {pytester.path}; exec {sys.executable} -m pytest -p no:cacheprovider
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_mounted_onto_itself_needs_no_mount(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pathlib
        FILE = pathlib.Path("/opt/itself/file")

        def test_it(nsbox_container):
            assert nsbox_container.read_text("/opt/itself/file") == "there\\n"
            nsbox_container.write_text("/opt/itself/file", "changed")
            assert FILE.read_text() == "there\\n"
            rows = nsbox_container.read_text("/proc/mounts").splitlines()
            mounted = [row.split()[1] for row in rows]
            assert "/opt/itself" not in mounted
            assert nsbox_container.read_text("/opt/itself/other/file") == "of the other\\n"
            assert nsbox_container.read_text("/opt/elsewhere/file") == "there\\n"
            assert "/opt/elsewhere" in mounted

        def test_what_it_is_on_is_hidden(nsbox_container):
            assert nsbox_container.read_text("/opt/hidden/q/c/file") == "of q\\n"

        def test_read_only(nsbox_container):
            done = nsbox_container.run(["touch", "/opt/read-only/new"])
            assert "Read-only" in done.stderr
        """
    )
    script = f"""
        set -e
        mount -t tmpfs opt /opt; cd /opt; mkdir itself itself/other elsewhere read-only
        echo there > itself/file
        mount --bind itself itself; mount --bind itself elsewhere
        mount -t tmpfs other itself/other; echo of the other > itself/other/file
        mkdir -p q/c hidden/q; echo of q > q/c/file; mount --bind q hidden/q
        mount -t tmpfs over hidden; mkdir -p hidden/q/c; mount --bind q/c hidden/q/c
        mount --bind read-only read-only; mount -o remount,bind,ro read-only
        cd {pytester.path}; exec {sys.executable} -m pytest -p no:cacheprovider
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_container_needs_is_mounted(nsbox_container: Container) -> None:
    mounts = [line.split() for line in nsbox_container.read_text("/proc/mounts").splitlines()]
    kinds = {fields[1]: fields[2] for fields in mounts}
    assert kinds["/"] == "overlay"
    assert kinds["/proc"] == "proc"
    assert kinds["/sys"] == "sysfs"
    assert kinds["/dev"] == "tmpfs"
    assert kinds["/dev/pts"] == "devpts"
    assert kinds["/dev/mqueue"] == "mqueue"
    # empty but for the way to this very project, if that is where it is
    names = nsbox_container.run("ls -A /tmp", shell=True, check=True).stdout.split()
    assert not {name for name in names if name not in f"{Path.cwd()}/".split("/")}
    for directory in ("/tmp", "/dev/shm", "/run/lock"):
        mode = nsbox_container.run(["stat", "-c%a", directory], check=True).stdout
        assert mode == "1777\n", directory


PLACES = ("/", "/run", "/run/lock", "/tmp", "/dev", "/dev/null", "/etc/hosts", "/etc")


@pytest.mark.parametrize("userns", [False, True])
def test_modes_are_the_same_whatever_the_umask_of_the_test(tmp_path: Path, userns: bool) -> None:
    script = f"""
        import os, sys
        from pytest_nsbox import Session
        os.umask(int(sys.argv[1], 8))
        with Session() as session, session.container(userns={userns}, memory="64M") as container:
            print(container.run(["sh", "-c", "stat -c '%n %a' {" ".join(PLACES)}; umask"]).stdout)
    """
    found = {
        mask: subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), mask],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for mask in ("077", "000")
    }
    assert "/run 755\n/run/lock 1777\n/tmp 1777\n/dev 755\n" in found["077"]
    assert found["077"] == found["000"]


@pytest.mark.parametrize("directory", ["/tmp", "/run"])
def test_tmp_and_run_are_its_own(nsbox_container: Container, directory: str) -> None:
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        assert nsbox_container.run(["test", "-e", file.name]).returncode == 1
    mounts = nsbox_container.read_text("/proc/mounts").splitlines()
    options = [line.split()[3].split(",") for line in mounts if line.split()[1] == directory]
    assert len(options) == 1
    assert {"nosuid", "nodev"} <= set(options[0])
    nsbox_container.write_text(f"{directory}/nsbox-was-here", "")
    assert not os.path.exists(f"{directory}/nsbox-was-here")


def test_dev_has_its_nodes_and_no_others(nsbox_container: Container) -> None:
    def nodes() -> set[str]:
        found = set()
        for directory, _, names in os.walk("/dev"):
            for name in names:
                path = os.path.join(directory, name)
                mode = os.lstat(path).st_mode
                if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                    found.add(path)
        return found - {"/dev/pts/ptmx"}

    wanted = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    assert nsbox_container.call(nodes) - {"/dev/net/tun"} == wanted
    script = "echo x > /dev/null && head -c4 /dev/zero | wc -c && head -c4 /dev/urandom | wc -c"
    assert nsbox_container.run(script, shell=True, check=True).stdout.split() == ["4", "4"]
    assert "No space" in nsbox_container.run("head -c1 /dev/zero > /dev/full", shell=True).stderr


def test_a_device_node_made_inside_opens_nothing(nsbox_container: Container) -> None:
    """The host's disk cannot be reached by a node of its number, wherever that is made."""
    for directory in ("/dev", "/tmp", "/var", "/dev/shm"):
        node = f"{directory}/disk"
        made = nsbox_container.run(["mknod", node, "c", "1", "3"])
        if made.returncode == 0:
            opened = nsbox_container.run(["cat", node])
            assert "Permission denied" in opened.stderr, directory


def test_terminals_can_be_opened(nsbox_container: Container) -> None:
    script = "import os, pty; pid, fd = pty.fork(); pid or print('from a tty'); "
    script += "pid and print(os.read(fd, 100).decode())"
    assert "from a tty" in nsbox_container.run(["python3", "-c", script], check=True).stdout


def test_the_names_of_the_container_are_in_its_files(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory("web", hosts={"db.test": "198.51.100.7"})
    assert container.read_text("/etc/hostname") == "web\n"
    hosts = container.read_text("/etc/hosts")
    assert "172.27.0.2\tweb\n" in hosts
    assert "198.51.100.7\tdb.test\n" in hosts
    assert Path("/etc/hostname").read_text() != "web\n"


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_is_started_from(
    nsbox_container_factory: Any, images: Images, source: str
) -> None:
    container = nsbox_container_factory(rootfs=getattr(images, source))
    release = container.read_text("/etc/release")
    if source in ("tree", "tarball"):
        assert release == "from the tree\n"
        return
    # the layers lie in the order of the manifest
    assert release == "from the second layer\n"
    result = container.run("pwd; echo $GREETING; ls", shell=True, check=True)
    assert result.stdout.split() == ["/var/www", "hello", "index.html"]
    container.popen(["httpd", "-f", "-p", "80", "-h", "/var/www"])
    container.wait_for_port(80)
    with container.connect(80) as sock:
        sock.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
        assert sock.makefile("rb").read().endswith(b"hello from the image\n")


@pytest.mark.parametrize("source", ["debian_tree", "debian_docker_archive"])
def test_a_whole_distribution_is_started_from(
    nsbox_container_factory: Any, images: Images, source: str
) -> None:
    """Its package manager works, set-user-ID bits are kept, and it serves."""
    container = nsbox_container_factory(rootfs=getattr(images, source))
    container.run(["dpkg", "--verify", "dpkg", "coreutils"], check=True)
    mode, owner = container.run(["stat", "-c%a %U", "/usr/bin/passwd"]).stdout.split()
    assert (mode, owner) == ("4755", "root")
    container.run(["dpkg", "--remove", "--force-all", "tzdata"], check=True)
    script = "import socket; s = socket.create_server(('', 80)); s.accept()[0].sendall(b'served')"
    container.popen(["python3", "-c", script])
    container.wait_for_port(80)
    with container.connect(80) as sock:
        assert sock.recv(100) == b"served"


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_written_to_an_image(
    nsbox_container_factory: Any, images: Images, source: str
) -> None:
    rootfs = getattr(images, source)
    with nsbox_container_factory(rootfs=rootfs) as container:
        before = container.read_text("/etc/release")
        container.write_text("/etc/release", "changed")
        container.run(["rm", "-r", "/root"], check=True)
    again = nsbox_container_factory(rootfs=rootfs)
    assert again.read_text("/etc/release") == before
    again.run(["ls", "/root"], check=True)
    assert (images.tree / "etc/release").read_text() == "from the tree\n"
    assert not (images.tree / "proc").exists()


def test_the_option_chooses_the_image_for_all(run_pytest: Any, images: Images) -> None:
    source = """
        def test_it(nsbox_container):
            assert nsbox_container.read_text("/etc/release") == "from the second layer\\n"
    """
    run_pytest(source, f"--nsbox-rootfs={images.docker_archive}").assert_outcomes(passed=1)


def test_an_image_is_copied_from_where_the_hosts_network_reaches(
    run_pytest: Any, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the registry is asked once by all containers of a run."""
    log = as_a_registry(images.oci_layout, tmp_path / "path", monkeypatch)
    source = """
        import pytest
        @pytest.mark.parametrize("n", range(3))
        def test_it(nsbox_container, n):
            assert nsbox_container.read_text("/etc/release") == "from the second layer\\n"
    """
    run_pytest(source, f"--nsbox-rootfs={REGISTRY}").assert_outcomes(passed=3)
    here = os.readlink("/proc/self/ns/net")
    assert log.read_text().splitlines() == [f"inspect {here}", f"copy {here}"]


def test_an_opaque_directory_hides_the_layers_below_also_in_a_user_namespace(
    nsbox_container_factory: Any, tmp_path: Path
) -> None:
    """The overlay reads the mark by another name there."""
    layers = []
    for number, names in enumerate((["bin/sh", "both/old"], ["both/new", "both/.wh..wh..opq"])):
        root = tmp_path / f"layer{number}"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        layers.append(root)
    shutil.copy(tool("busybox"), layers[0] / "bin/sh")
    (layers[0] / "bin/ls").symlink_to("sh")
    manifest = []
    with tarfile.open(tmp_path / "image.tar", "w") as image:
        for root in layers:
            with tarfile.open(tmp_path / f"{root.name}.tar", "w") as layer:
                layer.add(root, ".")
            image.add(tmp_path / f"{root.name}.tar", f"{root.name}.tar")
            manifest.append(f"{root.name}.tar")
        diff_ids = [
            "sha256:" + hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
            for name in manifest
        ]
        config = {"config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        rows = [{"Config": "config.json", "RepoTags": None, "Layers": manifest}]
        for name, value in (("config.json", config), ("manifest.json", rows)):
            (tmp_path / name).write_text(json.dumps(value))
            image.add(tmp_path / name, name)
    for userns in (False, True):
        container = nsbox_container_factory(rootfs=tmp_path / "image.tar", userns=userns)
        assert container.run(["ls", "/both"], check=True).stdout == "new\n"


@pytest.mark.parametrize("userns", [False, True])
def test_a_read_only_root_refuses_to_be_written(nsbox_container_factory: Any, userns: bool) -> None:
    container = nsbox_container_factory(read_only=True, userns=userns)
    for path in ("/x", "/etc/x", "/var/x"):
        with pytest.raises(OSError, match="Read-only"):
            container.write_text(path, "")
    container.write_text("/tmp/written", "still here")


def test_directories_and_tmpfs_are_mounted_as_asked(
    nsbox_container_factory: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("from the host")
    container = nsbox_container_factory(
        mounts=[
            Bind(tmp_path, "/mnt/ro"),
            Bind(tmp_path, "/mnt/rw", read_only=False),
            Tmpfs("/mnt/small", size="1M"),
        ]
    )
    assert container.read_text("/mnt/ro/file") == "from the host"
    with pytest.raises(OSError, match="Read-only"):
        container.write_text("/mnt/ro/file", "")
    container.write_text("/mnt/rw/back", "from inside")
    assert (tmp_path / "back").read_text() == "from inside"
    assert container.run("head -c 2M /dev/zero > /mnt/small/x", shell=True).returncode != 0


def test_proc_and_sys_are_masked(nsbox_container: Container) -> None:
    assert nsbox_container.read_text("/proc/keys") == ""
    for path in ("/proc/sys/vm/swappiness", "/proc/irq/default_smp_affinity", "/sys/fs/cgroup/x"):
        with pytest.raises(OSError, match="Read-only"):
            os.close(nsbox_container.open(path, os.O_WRONLY | os.O_CREAT))


@pytest.mark.sandbox(privileged=True)
def test_a_privileged_container_is_not_confined(nsbox_container: Container) -> None:
    status = nsbox_container.read_text("/proc/self/status")
    assert "NoNewPrivs:\t0" in status
    assert "Seccomp:\t0" in status
    nsbox_container.run(["mount", "-t", "tmpfs", "x", "/mnt"], check=True)
