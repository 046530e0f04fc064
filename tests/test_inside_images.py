"""Bodies on another root filesystem than the host's: this Python is brought there."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import Images

Run = Callable[..., pytest.RunResult]

SUITE = """
import os, pathlib, subprocess, sys
import pytest

@pytest.fixture(scope="module")
def wide():
    return os.getpid()

def test_it(wide, tmp_path, capfd, monkeypatch):
    assert os.getpid() != wide and os.getppid() == 0
    assert pathlib.Path("/etc/release").read_text() == "from the tree\\n"
    assert not os.path.exists("/etc/debian_version")
    assert subprocess.check_output(["sh", "-c", "echo of the image"]) == b"of the image\\n"
    (tmp_path / "kept").write_text("kept")
    print("printed")
    assert capfd.readouterr().out == "printed\\n"

def test_what_has_not_been_imported_yet():
    assert not {"_sqlite3", "_curses", "wave"} & set(sys.modules)
    import curses, sqlite3, ssl, wave
    assert sqlite3.connect(":memory:").execute("select 41 + 1").fetchone() == (42,)
    ssl.create_default_context()

def test_python_as_a_program():
    script = "import sqlite3, ssl, curses, pytest, socket; print(socket.gethostbyname('localhost'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("127.0.0.1\\n", "")

def test_the_suite_is_read_only():
    assert os.path.samefile(os.getcwd(), os.path.dirname(__file__))
    for directory in (os.getcwd(), sys.prefix, os.path.dirname(os.__file__)):
        with pytest.raises(OSError, match="Read-only"):
            open(f"{directory}/new", "w")
    with open("/etc/new", "w") as file:
        file.write("into the image's copy")

def test_fails():
    assert os.listdir("/var") == []
"""

# where this Python is; not below what every container has for itself
PYTHON = next(path for path in (sys.prefix, sys.base_prefix) if not path.startswith("/tmp/"))


@pytest.mark.parametrize(
    "source", ["tree", "tarball", "docker_archive", "oci_archive", "glibc_tree", "musl_tree"]
)
def test_a_body_runs_on_an_image(
    run_pytest: Run, pytester: pytest.Pytester, images: Images, source: str
) -> None:
    text = SUITE
    if source.endswith("archive"):
        text = SUITE.replace("from the tree", "from the second layer")
    if source == "musl_tree":
        text = SUITE.replace('["sh", "-c", "echo of the image"]', '["hello"]')
    result = run_pytest(
        text,
        *("--nsbox-all", f"--nsbox-rootfs={getattr(images, source)}", "--nsbox-changes"),
        f"--basetemp={pytester.path}/base",
    )
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(["*assert os.listdir*", "E * AssertionError: assert *"])
    assert (pytester.path / "base/test_it0/kept").read_text() == "kept"
    # what was brought along is nobody's change
    lines = result.stdout.lines
    start = next(n for n, line in enumerate(lines) if "changed by bodies" in line)
    assert lines[start + 1 : start + 3] == [
        "test_it.py::test_the_suite_is_read_only",
        "  added   /etc/new",
    ]
    assert not any("added" in line for line in lines[start + 3 :])


def test_the_images_variables_are_the_bodys_and_its_directory_is_not(
    run_pytest: Run, images: Images
) -> None:
    result = run_pytest(
        """
        import os, shutil, subprocess, sys, pytest

        def test_of_the_image():
            assert os.environ["GREETING"] == "hello"
            assert os.getcwd() == os.path.dirname(__file__)
            assert shutil.which("python") == sys.prefix + "/bin/python"
            assert shutil.which("ls") == "/bin/ls"

        @pytest.mark.sandbox(env={"GREETING": "mine"}, cwd="/var/www")
        def test_the_marker_wins():
            assert (os.environ["GREETING"], os.getcwd()) == ("mine", "/var/www")
        """,
        *("--nsbox-all", f"--nsbox-rootfs={images.docker_archive}"),
        conftest="""
        import os, sys

        os.environ["PATH"] = f"{sys.prefix}/bin:/opt/of-the-host/bin"
        """,
    )
    result.assert_outcomes(passed=2)


def test_a_body_runs_on_a_prepared_image(run_pytest: Run, images: Images) -> None:
    result = run_pytest(
        """
        import os, subprocess, sys, pytest

        @pytest.mark.parametrize("n", range(2))
        def test_it(n):
            assert open("/etc/prepared").read() == "in a snapshot"
            assert not os.path.exists("/etc/release")
            import sqlite3
            subprocess.run([sys.executable, "-c", "import sqlite3"], check=True)
        """,
        *("--nsbox-all", "--nsbox-rootfs=my:prepared"),
        conftest=f"""
        import functools, pathlib, sys
        import pytest_nsbox

        session = pytest_nsbox.Session()

        @functools.cache
        def prepared():
            with session.container(rootfs={str(images.tree)!r}) as container:
                container.write_text("/etc/prepared", "in a snapshot")
                container.run(["rm", "/etc/release"], check=True)
                top = "/" + pathlib.Path({PYTHON!r}).parts[1]
                container.run(["rm", "-rf", top], check=True)
                container.run(["ln", "-s", "/var/elsewhere", top], check=True)
                return container.snapshot()

        def pytest_nsbox_resolve_rootfs(source):
            return prepared() if source == "my:prepared" else None

        def pytest_unconfigure():
            session.close()
        """,
    )
    result.assert_outcomes(passed=2)


def test_images_by_marker_by_fixture_and_by_hook(run_pytest: Run, images: Images) -> None:
    result = run_pytest(
        f"""
        import os, pytest

        @pytest.fixture
        def nsbox_spec():
            return {{"rootfs": {str(images.tree)!r}}}

        def test_by_fixture():
            assert os.path.exists("/etc/release")

        @pytest.mark.sandbox(rootfs={str(images.tarball)!r})
        def test_by_marker():
            assert os.path.exists("/etc/release")

        @pytest.mark.sandbox(rootfs="host")
        def test_by_hook():
            assert os.path.exists("/etc/release")
        """,
        "--nsbox-all",
        conftest=f"""
        def pytest_nsbox_configure_spec(item, spec):
            if item.name == "test_by_hook":
                return spec.replace(rootfs={str(images.tree)!r})
        """,
    )
    result.assert_outcomes(passed=3)


def test_a_module_takes_the_libraries_of_the_host_before_the_images(
    run_pytest: Run, images: Images
) -> None:
    """Those of an image may be made for a C library that this process has not loaded."""
    root = Path(shutil.copytree(images.glibc_tree, images.directory / "other", symlinks=True))
    (place,) = {path.parent for path in (root / "usr/lib").rglob("libc.so.6")}
    for name in ("libsqlite3.so.0", "libssl.so.3"):
        (place / name).write_text("no library at all")
    result = run_pytest(
        f"""
        def test_it():
            import sqlite3, ssl
            assert open("/{place.relative_to(root)}/libssl.so.3").read() == "no library at all"
        """,
        *("--nsbox-all", f"--nsbox-rootfs={root}"),
    )
    result.assert_outcomes(passed=1)


def test_links_of_the_image_lead_to_what_is_brought(run_pytest: Run, images: Images) -> None:
    """The directory that this Python is in may be a link there, to an absolute path."""
    root = images.copy_of_tree("links")
    top = Path(PYTHON).parts[1]
    shutil.rmtree(root / top, ignore_errors=True)
    (root / top).symlink_to("/var/elsewhere")
    result = run_pytest(
        f"""
        import os, subprocess, sys

        def test_it():
            assert os.path.realpath({PYTHON!r} + "/bin").startswith("/var/elsewhere/")
            import sqlite3
            subprocess.run([sys.executable, "-c", "import sqlite3"], check=True)
        """,
        *("--nsbox-all", f"--nsbox-rootfs={root}"),
    )
    result.assert_outcomes(passed=1)


SIMPLE = """
    import pytest

    def test_one(): pass
    def test_two(): pass
    @pytest.mark.sandbox(rootfs="host")
    def test_on_the_host(): pass
"""


@pytest.fixture
def other_c_library(images: Images) -> Iterator[Path]:
    """An image with musl where this Python looks for its loader, as with Alpine's gcompat."""
    root = Path(shutil.copytree(images.musl_tree, images.directory / "gcompat", symlinks=True))
    (root / "lib64").mkdir()
    (root / "lib64/ld-linux-x86-64.so.2").symlink_to("/lib/ld-musl-x86_64.so.1")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def other_machine(images: Images) -> Iterator[Path]:
    """An image whose shell is a program for aarch64, by its header."""
    root = images.copy_of_tree("aarch64")
    with open(root / "bin/busybox", "r+b") as file:
        file.seek(18)
        file.write(struct.pack("<H", 183))
    yield root
    shutil.rmtree(root)


def test_another_c_library_is_said_before_the_first_test(
    run_pytest: Run, other_c_library: Path
) -> None:
    options = ("--nsbox-all", f"--nsbox-rootfs={other_c_library}")
    result = run_pytest(SIMPLE, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.parseoutcomes() == {}
    result.stderr.fnmatch_lines(
        [
            f"ERROR: test_it.py::test_one: a test's body cannot run on rootfs '{other_c_library}': "
            "this Python (*) does not start there: *; it needs glibc *take nsbox_container*"
        ]
    )
    result = run_pytest(SIMPLE, *options, "--nsbox-unsupported=skip", "-rs")
    result.assert_outcomes(skipped=2, passed=1)
    result.stdout.fnmatch_lines(["SKIPPED * nsbox: a test's body cannot run on rootfs *"])
    result = run_pytest(SIMPLE, *options, "-p", "xdist", "-n1")
    result.assert_outcomes(errors=2, passed=1)
    result.stdout.fnmatch_lines(["test_it.py::test_two: a test's body cannot run on rootfs *"])


def test_another_machine_is_said_before_the_first_test(
    run_pytest: Run, other_machine: Path
) -> None:
    result = run_pytest(
        f"""
        import pytest

        def test_first(): pass

        @pytest.mark.sandbox(rootfs={str(other_machine)!r})
        def test_marked(): pass
        """
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: test_it.py::test_marked: *its /bin/sh does not start: Exec format error; it "
            "is a program for aarch64, and this machine is x86_64: take the image for it *"
        ]
    )
    # a fixture or a hook may say otherwise, when it is asked
    result = run_pytest(
        """
        import pytest

        @pytest.fixture
        def nsbox_spec():
            return {"rootfs": "host"}

        def test_it(): pass
        """,
        *("--nsbox-all", f"--nsbox-rootfs={other_machine}"),
    )
    result.assert_outcomes(passed=1)


def test_an_image_under_xdist_is_brought_what_it_needs_once(
    run_pytest: Run, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run_pytest(
        """
        import pytest

        @pytest.mark.parametrize("n", range(4))
        def test_it(n):
            import sqlite3
            assert open("/etc/release").read() == "from the tree\\n"
        """,
        *("--nsbox-all", f"--nsbox-rootfs={images.tree}", "-p", "xdist", "-n2"),
    )
    result.assert_outcomes(passed=4)
    assert len(os.listdir(tmp_path / "nsbox/layers")) == 1


def test_a_body_runs_on_a_whole_distribution(run_pytest: Run, images: Images) -> None:
    """It has its own C library, libraries of its own, and a Python beside this one."""
    result = run_pytest(
        """
        import multiprocessing, os, subprocess, sys

        def out(*command):
            return subprocess.check_output(command, text=True)

        def test_modules():
            assert not {"_sqlite3", "_ssl"} & set(sys.modules)
            import sqlite3, ssl
            assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
            ssl.create_default_context()

        def test_programs():
            script = "import sys; print(sys.prefix, sys.version)"
            assert out(sys.executable, "-c", script).strip() == f"{sys.prefix} {sys.version}"
            out(sys.executable, "-c", "import sqlite3, ssl, pytest")
            assert "apt" in out("apt-get", "--version")
            assert out("dpkg", "--print-architecture") == "amd64\\n"

        def test_a_process_pool():
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                assert pool.apply(os.getppid) == os.getpid()
        """,
        *("--nsbox-all", f"--nsbox-rootfs={images.debian_tree}"),
    )
    result.assert_outcomes(passed=3)
