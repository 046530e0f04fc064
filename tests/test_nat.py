"""The way out: proved against an outside that these tests have made."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import command_line
from tests.outside import HOST, WEB, Outside, outside

CURL = f'["curl", "-s", "-m", "5", "http://{WEB}/"]'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with outside(tmp_path_factory.mktemp("outside")) as made:
        yield made


def run_there(world: Outside, pytester: pytest.Pytester, source: str, *args: str) -> str:
    """Run pytest on the stand-in for the host; it must pass, and leave that as it was."""
    pytester.makepyfile(source)
    before = world.state()
    done = subprocess.run(
        [*world.enter, "env", "-C", str(pytester.path), *command_line(), *args],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert world.state() == before
    return done.stdout


def test_nat_reaches_the_outside_with_the_hosts_address(
    world: Outside, pytester: pytest.Pytester
) -> None:
    source = f"""
        def test_it(nsbox_container):
            assert nsbox_container.run({CURL}, check=True).stdout == "you are {HOST}"
            nsbox_container.run(["ping", "-c1", "-W2", "{WEB}"], check=True)
        """
    run_there(world, pytester, source)


def test_names_are_resolved(world: Outside, pytester: pytest.Pytester) -> None:
    source = f"""
        import socket, pytest

        def test_outside_the_body(nsbox_container):
            command = ["curl", "-s", "-m", "5", "http://www.example.test/"]
            assert nsbox_container.run(command, check=True).stdout == "you are {HOST}"

        @pytest.mark.sandbox
        def test_inside():
            assert socket.gethostbyname("www.example.test") == "{WEB}"
        """
    run_there(world, pytester, source)


def test_other_name_servers_can_be_given(world: Outside, pytester: pytest.Pytester) -> None:
    source = """
        import pytest

        @pytest.mark.sandbox(dns=["203.0.113.53"], hosts={"db.test": "198.51.100.9"})
        def test_it(nsbox_container):
            assert nsbox_container.read_text("/etc/resolv.conf") == "nameserver 203.0.113.53\\n"
            found = nsbox_container.run(["getent", "hosts", "db.test"], check=True).stdout
            assert found.split()[0] == "198.51.100.9"
        """
    run_there(world, pytester, source)


@pytest.mark.parametrize("mode", ["isolated", "none"])
def test_isolated_and_none_have_no_way_out(
    world: Outside, pytester: pytest.Pytester, mode: str
) -> None:
    """Not by default, and not by a route that the container adds: there is none to be had, though
    the same session has a way out for others."""
    source = f"""
        def test_it(nsbox_container, nsbox_container_factory):
            nsbox_container_factory(network="nat").run({CURL}, check=True)
            assert nsbox_container.run({CURL}).returncode in (7, 28)
            nsbox_container.run("ip route add default via 172.27.0.1", shell=True)
            nsbox_container.run("ip route add {WEB} via 172.27.0.1", shell=True)
            assert nsbox_container.run({CURL}).returncode in (7, 28)
        """
    run_there(world, pytester, source, f"--nsbox-network={mode}")


def test_a_network_without_internet_has_no_way_out(
    world: Outside, pytester: pytest.Pytester
) -> None:
    source = f"""
        def test_it(nsbox_container_factory, nsbox_network_factory):
            shut = nsbox_network_factory(internet=False)
            open_ = nsbox_network_factory()
            assert nsbox_container_factory(networks=[shut]).run({CURL}).returncode in (7, 28)
            assert nsbox_container_factory(networks=[open_]).run({CURL}).returncode == 0
        """
    run_there(world, pytester, source)


def test_without_an_uplink_there_is_no_way_out(world: Outside, pytester: pytest.Pytester) -> None:
    source = f"""
        def test_it(nsbox_container):
            assert nsbox_container.run({CURL}).returncode in (7, 28)
        """
    run_there(world, pytester, source, "--nsbox-uplink=none")


def test_two_sessions_share_the_hosts_sysctl_and_the_last_puts_it_back(
    world: Outside, pytester: pytest.Pytester
) -> None:
    """The first to end must not cut off the other."""
    pytester.makepyfile(
        f"""
        import os, pathlib

        def test_it(nsbox_container):
            me, other, waits = os.environ["ME"], os.environ["OTHER"], os.environ["WAITS"]
            pathlib.Path(me).touch()
            nsbox_container.wait_until(pathlib.Path(other).exists)
            if waits == "yes":
                nsbox_container.wait_until(pathlib.Path("first-has-ended").exists, timeout=60)
            assert nsbox_container.run({CURL}, check=True).stdout == "you are {HOST}"
        """
    )
    before = world.state()
    runs = []
    for me, other, waits in (("one", "two", "no"), ("two", "one", "yes")):
        env = {**os.environ, "ME": me, "OTHER": other, "WAITS": waits}
        command = [*world.enter, "env", "-C", str(pytester.path), *command_line()]
        runs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [runs[0].communicate(timeout=120)[0]]
    (pytester.path / "first-has-ended").touch()
    outputs.append(runs[1].communicate(timeout=120)[0])
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    assert world.state() == before


def test_a_killed_session_is_swept_by_the_next_and_the_sysctl_put_back(
    world: Outside, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    """Both pytest and its launcher die by SIGKILL: only the sysctl can outlive them."""
    pytester.makepyfile(
        f"""
        import os, signal

        def test_it(nsbox_container):
            nsbox_container.run({CURL}, check=True)
            os.kill(nsbox_container.session._launcher.pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    before = world.state()
    command = [*world.enter, "env", "-C", str(pytester.path), *command_line()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    run_source = "def test_it(nsbox_container): pass"
    for path in pytester.path.glob("test_*.py"):
        path.unlink()
    pytester.makepyfile(test_next=run_source)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert world.state() == before
