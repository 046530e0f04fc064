"""Who is on a network knows the names of the others, those who come later included."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Bind, Container, Session


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session() as session:
        yield session


def _hosts(container: Container) -> list[str]:
    return container.read_text("/etc/hosts").splitlines()


def test_who_was_there_before_learns_a_new_name_and_loses_none(session: Session) -> None:
    with session.container("a") as a, session.container("b") as b:
        before = _hosts(a)
        with session.container("c") as c:
            assert _hosts(a) == [*before, f"{c.ip}\tc"]
            assert f"{b.ip}\tb" in before
            assert f"{c.ip}\tc" in _hosts(b)
            assert a.changes() == []


def test_who_stands_still_has_the_name_when_it_goes_on(session: Session) -> None:
    with session.container("a") as a:
        a.pause()
        with session.container("c") as c:
            a.unpause()
            assert _hosts(a)[-1] == f"{c.ip}\tc"


def test_an_address_given_out_again_has_its_new_name_alone(session: Session) -> None:
    with session.container("a") as a:
        with session.container("b") as b:
            gone = f"{b.ip}\tb"
            assert gone in _hosts(a)
        with session.container("c") as c:
            assert c.ip == b.ip
            assert f"{c.ip}\tc" in _hosts(a)
            assert gone not in _hosts(a)


@pytest.mark.parametrize(
    "change",
    [
        "echo 10.1.2.3 own >> /etc/hosts",
        "echo 10.1.2.3 own > /etc/hosts",
        "printf 10.1.2.3 >> /etc/hosts",
        "sed 's/^#//' /etc/hosts > /etc/other && mv /etc/other /etc/hosts",
        "rm /etc/hosts",
    ],
)
def test_who_has_changed_the_file_has_the_name_all_the_same(session: Session, change: str) -> None:
    with session.container("a") as a, session.container("b") as b:
        a.run(change, shell=True, check=True)
        with session.container("c") as c:
            a.wait_until(lambda: f"{c.ip}\tc" in _hosts(a))  # its init writes another file
            assert f"{b.ip}\tb" in _hosts(a)
        with session.container("d") as d:
            a.wait_until(lambda: f"{d.ip}\td" in _hosts(a))


@pytest.mark.parametrize("keywords", [{"read_only": True}, {"memory": "64M"}, {"disk": "8M"}])
def test_wherever_its_files_are_kept(session: Session, keywords: dict[str, Any]) -> None:
    with session.container("a", **keywords) as a, session.container("b") as b:
        assert _hosts(a)[-1] == f"{b.ip}\tb"


def test_on_two_networks_the_names_of_both_are_known(session: Session) -> None:
    with session.network("left") as left, session.network("right") as right:
        with session.container("a", networks=[left, right]) as a:
            with session.container("b", networks=[right]) as b:
                with session.container("c", networks=[left, right]) as c:
                    there = {line for line in _hosts(a) if line.endswith("\tc")}
                    assert len(there) == 2
                    assert f"{c.ip}\tc" in there
                    assert len(there.intersection(_hosts(b))) == 1


def test_who_has_left_one_of_two_networks_is_not_known_any_more(session: Session) -> None:
    with session.network("left") as left, session.network("right") as right:
        with session.container("a", networks=[left, right]) as a:
            with session.container("b", networks=[right]) as b:
                assert f"{b.ip}\tb" in _hosts(a)
            with session.container("c", networks=[left]) as c:
                assert f"{c.ip}\tc" in _hosts(a)
                assert f"{b.ip}\tb" not in _hosts(a)


def test_who_has_done_nothing_yet_knows_who_is_there_when_it_begins(session: Session) -> None:
    with session.container("a") as a:
        with session.container("b") as b:
            pass
        with session.container("c") as c, session.container("d") as d:
            assert _hosts(a)[-2:] == [f"{c.ip}\tc", f"{d.ip}\td"]
            assert f"{b.ip}\tb" not in _hosts(a)


@pytest.mark.parametrize("who", ["the test", "a fork of it"])
def test_what_runs_already_learns_a_new_name(session: Session, tmp_path: Path, who: str) -> None:
    learn = "until grep -q 'b$' /etc/hosts; do sleep 0.01; done; touch /shared/learned"
    with session.container("a", mounts=[Bind(str(tmp_path), "/shared", read_only=False)]) as a:
        pid = os.fork() if who == "a fork of it" else 0
        if pid == 0:
            try:
                a.popen(learn, shell=True)
            finally:
                if who == "a fork of it":
                    os._exit(0)
        else:
            os.waitpid(pid, 0)
        with session.container("b") as b:
            b.wait_until(lambda: (tmp_path / "learned").exists())


def test_a_new_container_costs_no_write_for_each_that_has_done_nothing() -> None:
    def written() -> tuple[int, int]:
        """Calls, and bytes."""
        lines = Path(f"/proc/{session._launcher.pid}/io").read_text().splitlines()  # type: ignore[union-attr]
        counts = dict(line.split(": ") for line in lines)
        return int(counts["syscw"]), int(counts["wchar"])

    with Session(pool=0) as session, ExitStack() as stack:
        calls, sizes = [], []
        for number in range(30):
            before = written()
            stack.enter_context(session.container(f"c{number}"))
            after = written()
            calls.append(after[0] - before[0])
            sizes.append(after[1] - before[1])
        assert max(calls[20:]) < min(calls[2:10]) + 10
        assert max(sizes[20:]) < min(sizes[2:10]) + 100


def test_many_containers_need_no_higher_limit_on_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        with Session() as session, ExitStack() as stack:
            for number in range(25):
                last = stack.enter_context(session.container(f"c{number}"))
            told = last.run("ulimit -Sn", shell=True).stdout
            assert told == "100\n"  # of the launcher's own it has not heard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
