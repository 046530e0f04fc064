"""A host whose firewall drops what it would forward, as Docker sets it: there is a way out all the
same, or it is said before the first test that there is none, and how to get one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import command_line, tool
from tests.outside import HOST, WEB, Outside, outside

CURL = f'["curl", "-sS", "-m", "5", "http://{WEB}/"]'
REACHES = f"""
    def test_it(nsbox_container):
        assert nsbox_container.run({CURL}, check=True).stdout == "you are {HOST}"
    """
REACHES_NOT = f"""
    def test_it(nsbox_container):
        assert nsbox_container.run({CURL}).returncode in (7, 28)
    """
FIREWALLS = {
    "nft policy": "nft add table ip filter; "
    "nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'",
    "nft rule": "nft add table inet firewalld; nft add chain inet firewalld filter_FORWARD "
    "'{ type filter hook forward priority 10; policy accept; }'; "
    "nft add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited",
    "iptables-nft": "iptables-nft -P FORWARD DROP",
    "iptables-legacy": "iptables-legacy -P FORWARD DROP",
}
"""As Docker, firewalld, and iptables of both kinds have it."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Outside]:
    (tmp_path / "world").mkdir()
    with outside(tmp_path / "world") as made:
        yield made


def run_there(
    world: Outside, pytester: pytest.Pytester, source: str, *args: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest on the stand-in for the host, which is left as it was."""
    pytester.makepyfile(test_it=source)
    before = world.state()
    done = subprocess.run(
        [*world.enter, "env", "-C", str(pytester.path), *command_line(), *args],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert world.state() == before
    return done


@pytest.mark.parametrize("firewall", FIREWALLS)
def test_behind_a_firewall_there_is_a_way_out(
    world: Outside, pytester: pytest.Pytester, firewall: str
) -> None:
    world.run("sh", "-ec", FIREWALLS[firewall])
    done = run_there(world, pytester, REACHES)
    assert done.returncode == 0, done.stdout
    assert "; uplink slirp4netns\n" in done.stdout


def test_without_one_the_way_out_is_a_veth_pair(world: Outside, pytester: pytest.Pytester) -> None:
    accepting = "{ type filter hook forward priority 0; policy accept; }"
    world.run("sh", "-ec", f"nft add table ip filter; nft add chain ip filter F '{accepting}'")
    done = run_there(world, pytester, REACHES)
    assert done.returncode == 0, done.stdout
    assert "uplink" not in done.stdout


def test_without_a_program_for_it_the_header_says_why_and_how_to_get_one(
    world: Outside, pytester: pytest.Pytester
) -> None:
    world.run("sh", "-ec", FIREWALLS["nft policy"])
    world.run("mount", "--bind", "/dev/null", tool("slirp4netns"))  # no program any more
    done = run_there(world, pytester, REACHES_NOT)
    assert done.returncode == 0, done.stdout
    header = done.stdout.partition("test_it.py")[0]
    assert "no way out of containers: this host does not forward packets of containers" in header
    assert "the policy of chain filter/FORWARD is to drop" in header
    assert "install slirp4netns" in header
    assert "iptables -I FORWARD -i nsbox+ -j ACCEPT" in header


def test_the_cure_cures(world: Outside, pytester: pytest.Pytester) -> None:
    world.run("iptables-legacy", "-P", "FORWARD", "DROP")
    world.run("iptables-legacy", "-I", "FORWARD", "-i", "nsbox+", "-j", "ACCEPT")
    world.run("iptables-legacy", "-I", "FORWARD", "-o", "nsbox+", "-j", "ACCEPT")
    done = run_there(world, pytester, REACHES, "--nsbox-uplink=veth")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("choice", "summary"), [("error", "1 error"), ("skip", "1 skipped")])
def test_a_veth_pair_asked_for_by_name_is_refused_before_the_first_test(
    world: Outside, pytester: pytest.Pytester, choice: str, summary: str
) -> None:
    world.run("sh", "-ec", FIREWALLS["nft rule"])
    options = ("--nsbox-uplink=veth", f"--nsbox-unsupported={choice}")
    done = run_there(world, pytester, REACHES, *options)
    header = done.stdout.partition("test_it.py ")[0]
    assert "nsbox: 1 test cannot run here, and will be" in header
    assert "--nsbox-uplink=veth: this host does not forward packets of containers" in header
    assert "a rule of its firewall refuses them" in header
    assert summary in done.stdout.splitlines()[-1]


def test_root_may_ask_for_slirp4netns_and_not_for_pasta(
    world: Outside, pytester: pytest.Pytester
) -> None:
    done = run_there(world, pytester, REACHES, "--nsbox-uplink=slirp4netns")
    assert done.returncode == 0, done.stdout
    done = run_there(world, pytester, REACHES, "--nsbox-uplink=pasta")
    assert done.returncode == 1
    assert "--nsbox-uplink=pasta is for ordinary users; root has 'veth'" in done.stdout
