"""What cannot be done is said once and clearly: what, which test, what is allowed, what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import SandboxSpec, SpecError, Tmpfs
from pytest_nsbox.model.addressing import Subnet
from pytest_nsbox.model.units import format_size, parse_duration, parse_size
from tests.audit import Snapshot

Run = Callable[..., pytest.RunResult]

KEYWORDS = {
    "cpu=1": "unknown keyword 'cpu'; did you mean 'cpus'",
    "cpus=0": "cpus=0: cpus is a number of cores, at least 0.01",
    "cpus='two'": "cpus='two': cpus is a number of cores",
    "cpuset='a-b'": "cpuset='a-b': cpuset is a list of cores",
    "memory='64X'": "memory='64X': a size is bytes as an int, or a string like '64M'",
    "memory='1K'": "memory='1K': memory is at least 4M",
    "memory=True": "memory=True: a size is bytes",
    "swap='1M'": "swap is a limit beside memory; set memory, too",
    "pids=0": "pids=0: pids is an int of at least 2",
    "network='bridge'": "network='bridge': network is one of 'nat', 'isolated', 'none', 'host'",
    "networks=['lan']": "networks is a list of Network objects",
    "hostname='under_score'": "hostname is letters, digits and hyphens",
    "dns='1.1.1.1'": "dns is a list of IP addresses",
    "hosts={'a': 'b'}": "hosts is a dict from names to IP addresses",
    "env={'A': 1}": "env is a dict of strings",
    "cwd='relative'": "cwd is an absolute path inside the container",
    "mounts=['/tmp']": "mounts is a list of Bind",
    "sysctls={'vm.swappiness': 1}": "'vm.swappiness' is not a namespaced sysctl",
    "uptime='soon'": "a duration is seconds as a number, or a string like '10s'",
    "capabilities=['+SYS_ADMN']": "SYS_ADMIN",
    "privileged='yes'": "privileged is True or False",
    "timeout=0": "timeout is more than 0 seconds",
    "disk='1M', memory='1M'": "memory is at least 4M",
    "disk='64M', memory='64M'": "it is at most half of that",
    "io={'speed': 1}": "io is a dict of some of rbps, wbps, riops, wiops",
    "rootfs='/no/such/image.tar'": "/no/such/image.tar",
}


@pytest.mark.parametrize("keywords", KEYWORDS)
def test_a_wrong_keyword_is_an_error_at_collection(
    run_pytest: Run, keywords: str, nothing_left: Snapshot
) -> None:
    result = run_pytest(
        f"""
        import pytest

        @pytest.mark.sandbox({keywords})
        def test_it(): pass
        """
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    text = result.stdout.str()
    assert "test_it.py::test_it: @pytest.mark.sandbox: " in text
    assert KEYWORDS[keywords] in text
    assert "Traceback" not in text
    assert "pytest_nsbox/" not in text


def test_a_positional_argument_is_an_error_at_collection(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.sandbox("64M")
        class TestIt:
            def test_it(self): pass
        """
    )
    assert "the marker takes keywords only" in result.stdout.str()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nsbox-network=bridge"], "one of nat, isolated, none, host"),
        (["--nsbox-subnet=172.27.0.0/31"], "too small"),
        (["--nsbox-subnet=172.27.0.1/16"], "has host bits set"),
        (["--nsbox-uplink=cable"], "one of auto, veth, pasta, slirp4netns, none"),
        (["--nsbox-unsupported=maybe"], "one of error, skip"),
    ],
)
def test_a_wrong_option_is_a_usage_error(run_pytest: Run, options: list[str], message: str) -> None:
    result = run_pytest("def test_it(nsbox_container): pass", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str()
    assert "Traceback" not in result.stderr.str()


def one_message(result: pytest.RunResult) -> str:
    """The report of a test that could not have its container: no frame of ours in it."""
    result.assert_outcomes(errors=1)
    text = result.stdout.str()
    assert "pytest_nsbox/" not in text, text
    return text


def test_a_rootfs_that_cannot_be_one_says_why(
    run_pytest: Run, tmp_path: Path, nothing_left: Snapshot
) -> None:
    text = tmp_path / "text.tar"
    text.write_text("this is no archive\n" * 100)
    shell_less = tmp_path / "shell-less.tar"
    (tmp_path / "hello").write_text("hello")
    with tarfile.open(shell_less, "w") as tar:
        tar.add(tmp_path / "hello", "bin/hello")
    for source, message in (
        (tmp_path / "none.tar", "none.tar does not exist; a root filesystem is 'host', a dir"),
        (text, "not a tar archive (bad header: invalid header); a root filesystem is"),
        (shell_less, "has no /bin/sh: /bin/sh does not exist; a container needs one"),
    ):
        result = run_pytest("def test_it(nsbox_container): pass", f"--nsbox-rootfs={source}")
        report = one_message(result)
        assert f"test_it.py::test_it: rootfs {str(source)!r}" in report
        assert message in report


def test_a_subnet_that_is_full_says_so(run_pytest: Run, nothing_left: Snapshot) -> None:
    result = run_pytest(
        """
        def test_it(nsbox_container_factory):
            for _ in range(10):
                nsbox_container_factory()
        """,
        "--nsbox-subnet=10.9.0.0/29",
    )
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert "subnet 10.9.0.0/29 is too small for 6 containers: it has room for 5" in text


def test_a_network_too_small_says_so(nsbox_network_factory: Any) -> None:
    with pytest.raises(SpecError, match="/30 or larger"):
        nsbox_network_factory(subnet="10.9.0.0/31")


def test_two_containers_of_one_name_are_refused(nsbox_container_factory: Any) -> None:
    nsbox_container_factory("a")
    with pytest.raises(SpecError, match="'a' is taken by one that still runs"):
        nsbox_container_factory("a")
    with pytest.raises(SpecError, match="as it is a host name"):
        nsbox_container_factory("a b")


def run_crippled(pytester: pytest.Pytester, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Run a test on a host that lacks something."""
    pytester.makepyfile(
        """
        import pytest

        def test_beside(nsbox_container): pass

        @pytest.mark.sandbox
        def test_inside(): pass
        """
    )
    os.chmod(pytester.path, 0o777)
    command = [*prefix, sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, timeout=120)


# the interpreter may be out of an ordinary user's reach, so this is root without its power
NO_USER_NAMESPACES = (
    *("unshare", "-U", "-r", "sh", "-c"),
    'echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-sys_admin "$@"',
    "sh",
)


def test_without_user_namespaces_an_ordinary_user_is_told_what_to_do(
    pytester: pytest.Pytester,
) -> None:
    done = run_crippled(pytester, *NO_USER_NAMESPACES)
    assert done.returncode == 1
    assert "needs a user namespace for containers: " in done.stdout
    assert "sudo sysctl -w user.max_user_namespaces=" in done.stdout
    assert "pytest_nsbox/" not in done.stdout, done.stdout


def test_root_without_capabilities_is_as_good_as_an_ordinary_user(
    pytester: pytest.Pytester, nothing_left: Snapshot
) -> None:
    """As in a container of Docker's kind, where that allows user namespaces."""
    done = run_crippled(pytester, "setpriv", "--bounding-set=-sys_admin")
    assert "2 passed" in done.stdout, done.stdout


def test_without_a_writable_cgroup_limits_are_refused_and_all_else_works(
    pytester: pytest.Pytester, nothing_left: Snapshot
) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_without_limits(nsbox_container):
            nsbox_container.run(["true"], check=True)

        @pytest.mark.sandbox(memory="64M")
        def test_with_limits(nsbox_container): pass
        """
    )
    script = f"""
        for dir in /sys/fs/cgroup/*/ /sys/fs/cgroup; do umount $dir 2>/dev/null; done
        exec {sys.executable} -m pytest -p no:cacheprovider
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=pytester.path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "1 passed, 1 error" in done.stdout, done.stdout
    assert "memory= cannot be kept: no cgroup can be written: none is mounted" in done.stdout
    assert "pytest_nsbox/" not in done.stdout, done.stdout


def test_unsupported_tests_are_skipped_when_that_is_wanted(pytester: pytest.Pytester) -> None:
    done = run_crippled(pytester, "env", "PYTEST_NSBOX_UNSUPPORTED=skip", *NO_USER_NAMESPACES)
    assert "2 skipped" in done.stdout, done.stdout
    assert done.returncode == 0


def test_without_overlay_the_message_names_the_module(run_pytest: Run) -> None:
    """The file system is refused by a filter, as no kernel without it is at hand."""
    result = run_pytest(
        "def test_it(nsbox_container): pass",
        conftest="""
        import pathlib
        real = pathlib.Path.read_text
        def read_text(self, *args, **kwargs):
            text = real(self, *args, **kwargs)
            return text.replace("overlay", "") if str(self) == "/proc/filesystems" else text
        pathlib.Path.read_text = read_text
        pathlib.Path.glob = lambda self, pattern: iter(())
        """,
    )
    text = one_message(result)
    assert "this kernel has no overlay filesystem; load its module: modprobe overlay" in text


def test_on_another_system_the_plugin_is_quiet_until_it_is_used(run_pytest: Run) -> None:
    result = run_pytest(
        """
        def test_plain(): pass
        def test_box(nsbox_container): pass
        """,
        conftest="import sys; sys.platform = 'darwin'",
    )
    result.assert_outcomes(passed=1, errors=1)
    text = result.stdout.str()
    assert "containers need Linux, this is darwin" in text
    assert "pytest_nsbox/" not in text, text


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("64MiB", 64 << 20), (5, 5), ("1.5K", 1536), ("2g", 2 << 30), ("7", 7)],
)
def test_sizes_are_read(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64X", "", "-1M", "M", None, -1, 1.5, True, "1e3"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(SpecError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [(3, 3), (0.5, 0.5), ("10s", 10), ("5m", 300), ("50d", 4_320_000)]
)
def test_durations_are_read(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10x", "", None, -1, float("inf"), "s", True])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(SpecError):
        parse_duration(text)


def test_sizes_are_written_for_people() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 67_000_000, 64 << 20, 3 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1 KiB",
        "63.9 MiB",
        "64 MiB",
        "3 TiB",
    ]


def test_addresses_are_given_lowest_first_and_again() -> None:
    subnet = Subnet("10.9.0.0/29")
    assert (subnet.gateway, [subnet.take() for _ in range(5)]) == ("10.9.0.1", [2, 3, 4, 5, 6])
    with pytest.raises(SpecError, match="room for 5"):
        subnet.take()
    subnet.give_back(3)
    subnet.give_back(5)
    assert (subnet.take(), subnet.take()) == (3, 5)
    assert (subnet.ip(3), subnet.ip6(3)) == ("10.9.0.3", "fd6e:7362:a09::3")


def test_a_spec_is_data(tmp_path: Path) -> None:
    spec = SandboxSpec.make(memory="64M", mounts=[Tmpfs("/x", "1M")])
    assert spec == SandboxSpec.make(memory=64 << 20, mounts=[Tmpfs("/x", "1M")])
    assert spec.replace(memory=None).memory is None
    with pytest.raises(AttributeError):
        spec.memory = 1  # type: ignore[misc]
