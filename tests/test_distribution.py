"""Workers of pytest-xdist: on one machine, and on machines of their own."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_nsbox import Session
from tests.audit import Snapshot
from tests.ordinary import run_as_ordinary_user

XDIST = ("-p", "xdist.plugin", "-p", "no:cacheprovider")
SOURCE = """
    import os, pytest

    @pytest.mark.parametrize("n", range(8))
    def test_each_has_the_first_address(nsbox_container, n):
        assert nsbox_container.ip == "172.27.0.2"
        nsbox_container.popen(["python3", "-m", "http.server", "80"])
        nsbox_container.wait_for_port(80)
        nsbox_container.connect(80).close()

    @pytest.mark.sandbox(memory="64M", pids=32)
    @pytest.mark.parametrize("n", range(4))
    def test_inside(n):
        with open("/etc/hostname") as file:
            assert file.read() == "nsbox1\\n"

    def test_where(record_property):
        record_property("net", os.readlink("/proc/self/ns/net"))
"""


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_of_one_machine_use_the_same_addresses_at_once(
    pytester: pytest.Pytester, workers: int, nothing_left: Snapshot
) -> None:
    pytester.makepyfile(SOURCE)
    result = pytester.runpytest_subprocess(*XDIST, f"-n{workers}")
    result.assert_outcomes(passed=13)


def test_sessions_find_their_way_out_at_once(nothing_left: Snapshot) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session()) for _ in range(6)]
        for session in sessions:
            session.describe()  # they are all there, and have it yet to find
        with ThreadPoolExecutor(len(sessions)) as pool:
            list(pool.map(lambda session: session.request("open_way_out"), sessions))


def test_workers_on_machines_of_their_own(
    pytester: pytest.Pytester, nothing_left: Snapshot
) -> None:
    """A machine is namespaces of its own here: network, mounts, processes, host name."""
    machine = Path(pytester.path, "machine")
    machine.write_text(
        "#!/bin/sh\n"
        "exec unshare -m -n -p -u -i --fork --kill-child --mount-proc sh -c "
        "'hostname other; ip link set lo up; mount -t tmpfs none /run; exec \"$@\"' sh "
        f'{sys.executable} "$@"\n'
    )
    machine.chmod(0o755)
    pytester.makepyfile(
        SOURCE
        + """
    def test_it_is_another_machine():
        assert os.uname().nodename == "other"
        assert os.listdir("/run") in ([], ["nsbox"])
    """
    )
    tx = f"--tx=2*popen//python={machine}"
    result = pytester.runpytest_subprocess(*XDIST, tx, "--dist=load")
    result.assert_outcomes(passed=14)


def test_workers_on_machines_of_their_own_need_no_root(
    tmp_path: Path, nothing_left: Snapshot
) -> None:
    """As an ordinary user of a machine, which is namespaces of its own."""
    machine = Path(tmp_path, "machine")
    machine.write_text(
        "#!/bin/sh\n"
        "exec unshare -U -r -m -n -p -u -i --fork --kill-child --mount-proc sh -c "
        "'hostname other; ip link set lo up; exec setpriv --bounding-set=-sys_admin "
        f'{sys.executable} "$@"\' sh "$@"\n'
    )
    machine.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    (home / "test_it.py").write_text(
        textwrap.dedent(
            """
            import os, pytest

            @pytest.mark.sandbox
            @pytest.mark.parametrize("n", range(4))
            def test_inside(n):
                os.remove("/etc/passwd")

            def test_as_whom(nsbox_session):
                assert os.uname().nodename == "other"
                assert nsbox_session.describe().startswith("rootless")
            """
        )
    )
    tx = f"--tx=2*popen//python={machine}"
    command = [sys.executable, "-m", "pytest", "-q", *XDIST, tx, "--dist=load", "test_it.py"]
    done = run_as_ordinary_user(tmp_path, *command)
    assert "5 passed" in done.stdout, done.stdout + done.stderr


def test_more_memory_than_there_is_is_a_warning_and_no_hang(pytester: pytest.Pytester) -> None:
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.sandbox(memory={half + (1 << 20)})
        @pytest.mark.parametrize("n", range(4))
        def test_inside(n): pass
        """
    )
    for workers, warned in (("-n2", 1), ("-n1", 0)):
        result = pytester.runpytest_subprocess(*XDIST, workers, "-W", "error")
        result.assert_outcomes(passed=4, warnings=warned)
        assert ("nsbox: 2 at once with memory=" in result.stdout.str()) == bool(warned)


def test_the_containers_of_one_test_count_together(pytester: pytest.Pytester) -> None:
    """Also those of a wider scope, and what `update` has made of them; once for a run."""
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.fixture(scope="module")
        def wide(nsbox_session):
            with nsbox_session.container(memory={quarter}) as container:
                yield container

        @pytest.mark.parametrize("n", range(2))
        def test_little(wide, nsbox_container_factory, n):
            nsbox_container_factory(memory={quarter})

        @pytest.mark.parametrize("n", range(2))
        def test_much(wide, nsbox_container_factory, n):
            wide.update(memory={quarter * 3})
            nsbox_container_factory(memory={quarter + (1 << 20)})
        """
    )
    for options, passed, warned in (
        (["-k", "little"], 2, 0),
        ([], 4, 1),
        ([*XDIST, "-n2", "--dist=each", "-k", "little"], 4, 0),
        ([*XDIST, "-n3", "--dist=each", "-k", "little"], 6, 3),
    ):
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", *options)
        result.assert_outcomes(passed=passed, warnings=warned)
        assert ("nsbox: 2 containers at once with memory=" in result.stdout.str()) == bool(warned)
