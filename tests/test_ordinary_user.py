"""The same tests, run by an ordinary user. Limits are another matter: they take a cgroup that is
the user's, which cgroups of version 1 never are; ci/v2 has the machine for that."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.audit import Snapshot
from tests.images import REGISTRY, Images, as_a_registry
from tests.ordinary import REPOSITORY, run_as_ordinary_user
from tests.outside import HOST, WEB, Outside, outside

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Outside]:
    (tmp_path / "world").mkdir()
    with outside(tmp_path / "world") as world:
        yield world


def as_user(
    tmp_path: Path, source: str, *options: str, **keywords: object
) -> subprocess.CompletedProcess[str]:
    """Run pytest as a user on a test file given as text."""
    import textwrap

    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home/test_it.py").write_text(textwrap.dedent(source))
    return run_as_ordinary_user(tmp_path, *PYTEST, *options, "test_it.py", **keywords)  # type: ignore[arg-type]


def covers() -> set[str]:
    """The directories that sessions have laid over the host's root."""
    return set(glob.glob("/dev/shm/nsbox-*"))


@pytest.mark.parametrize("subordinate", [True, False])
def test_an_ordinary_user_runs_the_examples_and_more(
    tmp_path: Path, subordinate: bool, nothing_left: Snapshot
) -> None:
    done = run_as_ordinary_user(
        tmp_path,
        *PYTEST,
        *("-c", str(REPOSITORY / "pyproject.toml")),
        *("-k", "not memory and not fork_bomb and not slow and not service_from_image"),
        *(str(REPOSITORY / name) for name in ("examples", "tests/test_namespaces.py")),
        subordinate=subordinate,
    )
    assert done.returncode == 0, done.stdout
    assert "rootless, with " + ("subordinate ids" if subordinate else "one id") in done.stdout


def test_files_of_the_hosts_are_changed_as_root_would(tmp_path: Path) -> None:
    done = as_user(
        tmp_path,
        """
        import os
        from pathlib import Path
        import pytest

        @pytest.mark.sandbox
        def test_inside():
            assert os.getuid() == 0
            Path("/etc/passwd").write_text("mine")
            Path("/usr/local/lib/mine").write_text("mine")
            Path("/var/lib/mine").mkdir()
            os.remove("/usr/bin/env")
            Path("/home/mine").mkdir()
            Path("kept").write_text("in the copy only")

        def test_from_outside(nsbox_container):
            nsbox_container.write_text("/etc/passwd", "root:x:0:0::/:/bin/sh\\n")
            assert nsbox_container.call(os.getuid) == 0
            assert nsbox_container.run(["id", "-un"]).stdout == "root\\n"
        """,
    )
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "home/kept").exists()


@pytest.mark.parametrize("subordinate", [True, False])
def test_a_body_runs_on_an_image(tmp_path: Path, images: Images, subordinate: bool) -> None:
    shutil.copy(images.tarball, tmp_path / "image.tar.gz")
    done = as_user(
        tmp_path,
        """
        import os, subprocess, sys
        import pytest

        def test_it(tmp_path):
            assert os.getuid() == 0
            assert open("/etc/release").read() == "from the tree\\n"
            (tmp_path / "file").touch()
            with pytest.raises(OSError, match="Read-only"):
                open("new", "w")
            open("/etc/new", "w").close()
            import sqlite3
            subprocess.run([sys.executable, "-c", "import sqlite3, ssl"], check=True)
        """,
        *("--nsbox-all", f"--nsbox-rootfs={tmp_path}/image.tar.gz"),
        subordinate=subordinate,
    )
    assert done.returncode == 0, done.stdout


def test_an_image_is_copied_from_where_the_hosts_network_reaches(
    tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    layout = shutil.copytree(images.oci_layout, tmp_path / "home/layout")
    log = as_a_registry(layout, tmp_path / "path", monkeypatch)
    done = as_user(
        tmp_path,
        """
        def test_it(nsbox_container):
            assert nsbox_container.read_text("/etc/release") == "from the second layer\\n"
        """,
        f"--nsbox-rootfs={REGISTRY}",
    )
    assert "1 passed" in done.stdout, done.stdout
    here = os.readlink("/proc/self/ns/net")
    assert log.read_text().splitlines() == [f"inspect {here}", f"copy {here}"]


def test_users_inside_are_those_of_the_subordinate_ids(tmp_path: Path) -> None:
    source = """
        def test_it(nsbox_container):
            done = nsbox_container.run(["id", "-u"], user="daemon", check=True)
            assert done.stdout == "1\\n"
        """
    done = as_user(tmp_path, source)
    assert done.returncode == 0, done.stdout
    done = as_user(tmp_path, source, subordinate=False)
    assert done.returncode == 1
    assert "user 1:1 is not mapped in this container's user namespace" in done.stdout
    assert "usermod --add-subuids" in done.stdout


@pytest.mark.parametrize("program", ["pasta", "slirp4netns"])
def test_the_way_out_is_there_and_none_to_the_hosts_loopback(
    world: Outside, tmp_path: Path, program: str
) -> None:
    before = world.state()
    done = as_user(
        tmp_path,
        f"""
        import http.server, threading, pytest

        def test_it(nsbox_container):
            get = ["curl", "-sS", "--noproxy", "*", "-m", "5"]
            there = nsbox_container.run([*get, "http://{WEB}/"], check=True)
            assert there.stdout == "you are {HOST}"
            server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            port = server.server_port
            gateways = [f"100.64.0.{{n}}" for n in (1, 2, 3)]
            for address in ("127.0.0.1", "172.27.0.1", *gateways):
                got = nsbox_container.run([*get, "-m", "1", f"http://{{address}}:{{port}}/"])
                assert got.returncode in (7, 28), (address, got)
        """,
        f"--nsbox-uplink={program}",
        enter=world.enter,
    )
    assert done.returncode == 0, done.stdout
    assert world.state() == before


def test_without_a_way_out_the_header_says_how_to_get_one(tmp_path: Path) -> None:
    source = """
        def test_it(nsbox_container):
            nsbox_container.run(["ping", "-c1", "-W1", "172.27.0.1"], check=True)
        """
    done = as_user(tmp_path, source, tun=False)
    assert done.returncode == 0, done.stdout
    assert "no way out of containers: /dev/net/tun is not there" in done.stdout
    done = as_user(tmp_path, source, "--nsbox-uplink=pasta", tun=False)
    assert done.returncode == 1
    assert "--nsbox-uplink=pasta: /dev/net/tun is not there" in done.stdout


def test_a_killed_run_of_an_ordinary_user_leaves_nothing(
    world: Outside, tmp_path: Path, nothing_left: Snapshot
) -> None:
    before = covers()
    done = as_user(
        tmp_path,
        """
        import os, signal

        def test_it(nsbox_container):
            nsbox_container.popen(["sleep", "1000"])
            os.kill(nsbox_container.session._launcher.pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        enter=world.enter,
    )
    assert done.returncode in (-9, 137), done.stdout
    left = covers() - before
    assert left  # a directory has no end of its own: the next session removes it
    done = as_user(tmp_path, "def test_it(nsbox_container): pass", enter=world.enter)
    assert done.returncode == 0, done.stdout
    assert not covers() & left
