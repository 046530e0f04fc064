"""What a container may use, and what is said when it goes over."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import Container, OutOfMemory, Session, SpecError
from tests.conftest import run_tool, undisturbed

HOG = ["python3", "-c", "x = bytearray(200 << 20)"]

BUSY = """
import os, time
begin, used = time.monotonic(), sum(os.times()[:2])
while time.monotonic() < begin + 2: pass
print((sum(os.times()[:2]) - used) / (time.monotonic() - begin))
"""


@pytest.mark.sandbox(cpus=0.5)
def test_a_busy_loop_gets_its_share_of_a_core(nsbox_container: Container) -> None:
    def share() -> float:
        return float(nsbox_container.run(["python3", "-S", "-c", BUSY], check=True).stdout)

    assert undisturbed(share, 0.45) == pytest.approx(0.5, abs=0.05)
    stats = nsbox_container.stats()
    assert stats.cpu >= 0.9
    assert stats.throttled is not None
    assert stats.throttled > 0


@pytest.mark.sandbox(cpuset="1")
def test_it_runs_on_the_cores_it_is_given(nsbox_container: Container) -> None:
    assert nsbox_container.call(os.sched_getaffinity, 0) == {1}


@pytest.mark.sandbox(memory="64M")
def test_over_memory_the_container_is_killed(nsbox_container: Container) -> None:
    sleeper = nsbox_container.popen(["sleep", "1000"])
    hog = nsbox_container.popen(HOG)
    assert sleeper.wait(60) == -9  # all of it, not only the largest process
    assert hog.wait(60) == -9
    with pytest.raises(OutOfMemory, match=r"out of memory: limit 64 MiB, peak 6[34](\.\d)? MiB"):
        nsbox_container.run(["true"])
    stats = nsbox_container.stats()
    assert stats.oom_kills >= 1
    assert stats.memory_limit == 64 << 20


def test_a_command_that_kills_itself_is_not_out_of_memory(
    nsbox_container_factory: Any,
) -> None:
    container = nsbox_container_factory(memory="64M")
    result = container.run("kill -9 $$", shell=True)
    assert (result.returncode, result.oom_killed) == (-9, False)
    container.run(["true"], check=True)


def test_the_report_says_out_of_memory_with_limit_and_peak(
    run_pytest: Callable[..., pytest.RunResult],
) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.sandbox(memory="64M")
        def test_inside():
            bytearray(200 << 20)

        @pytest.mark.sandbox(memory="64M")
        def test_outside(nsbox_container):
            nsbox_container.run(["python3", "-c", "x = bytearray(200 << 20)"], check=True)
        """
    )
    result.assert_outcomes(failed=2)
    text = result.stdout.str()
    assert text.count("out of memory: limit 64 MiB, peak 6") >= 2, text


@pytest.fixture
def directory_on_disk(tmp_path: Path) -> Iterator[Path]:
    """Below /var/tmp, or where that is memory, on a disk made of memory that no cgroup is charged
    for (brd, the kernel's Documentation/admin-guide/blockdev/ramdisk.rst)."""
    with contextlib.ExitStack() as stack:
        where = Path("/var/tmp")
        if run_tool("stat", "-fc%T", where).strip() in ("tmpfs", "overlayfs"):
            where = tmp_path
            run_tool("modprobe", "brd", "rd_nr=1", f"rd_size={600 << 10}")
            stack.callback(run_tool, "modprobe", "-r", "brd")
            run_tool("mkfs.ext4", "-q", "/dev/ram0")
            run_tool("mount", "/dev/ram0", where)
            stack.callback(run_tool, "umount", where)
        yield Path(stack.enter_context(tempfile.TemporaryDirectory(dir=where)))


def test_a_large_file_is_not_out_of_memory(directory_on_disk: Path) -> None:
    with Session(cache=directory_on_disk) as session, session.container(memory="64M") as container:
        command = "head -c 200M /dev/zero > /var/large; head -c 200M /dev/zero > /tmp/large"
        container.run(command, shell=True, check=True)
        result = container.run("head -c 200M /dev/zero > /run/large", shell=True)
        assert "No space left on device" in result.stderr
        sizes = container.run(["stat", "-c%s", "/var/large", "/tmp/large"]).stdout
        assert sizes.split() == [str(200 << 20)] * 2


def test_where_the_cache_is_memory_a_large_file_finds_no_space() -> None:
    """What is written counts as memory then, and the kernel cannot reclaim it."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as cache,
        Session(cache=cache) as session,
        session.container(memory="64M") as container,
    ):
        for path in ("/var/large", "/tmp/large", "/run/large"):
            result = container.run(f"head -c 200M /dev/zero > {path}", shell=True)
            assert result.returncode == 1
            assert "No space left on device" in result.stderr
        container.run(["python3", "-c", "x = bytearray(16 << 20)"], check=True)
        assert container.stats().oom_kills == 0


@pytest.mark.sandbox(pids=20)
def test_the_fork_past_pids_fails_with_eagain(nsbox_container: Container) -> None:
    def forks() -> tuple[int, int]:
        for count in range(100):
            try:
                if os.fork() == 0:
                    os.execlp("sleep", "sleep", "1000")
            except OSError as error:
                return count, error.errno or 0
        return 100, 0

    count, number = nsbox_container.call(forks)
    assert number == errno.EAGAIN
    assert 15 <= count < 20
    assert nsbox_container.stats().pids >= 15


@pytest.mark.sandbox(memory="64M", swap=0)
def test_swap_none_is_kept(nsbox_container: Container) -> None:
    for name, limit in (
        ("memory/memory.memsw.limit_in_bytes", str(64 << 20)),
        ("memory.swap.max", "0"),
    ):
        with contextlib.suppress(FileNotFoundError):
            assert nsbox_container.read_text(f"/sys/fs/cgroup/{name}").strip() == limit
            break
    else:
        pytest.fail("no limit on swap is to be seen")
    assert nsbox_container.run(HOG).oom_killed


def test_limits_are_changed_while_it_runs(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(memory="64M", pids=10)
    container.update(memory="512M", pids=100)
    assert not container.run(HOG).oom_killed
    assert container.stats().memory_limit == 512 << 20
    with pytest.raises(SpecError, match="memory=None: a limit can be changed, not lifted"):
        container.update(memory=None)
    with pytest.raises(SpecError, match="cannot change 'hostname'"):
        container.update(hostname="other")


def test_statistics_need_no_limit(nsbox_container: Container) -> None:
    nsbox_container.run(["python3", "-c", "sum(range(3_000_000))"], check=True)
    stats = nsbox_container.stats()
    assert stats.cpu > 0.01
    assert stats.memory > 0
    assert stats.pids == 1
    assert stats.oom_kills == 0


def test_a_paused_container_stands_still(nsbox_container: Container) -> None:
    ticker = nsbox_container.popen("while true; do echo tick; sleep 0.01; done", shell=True)
    nsbox_container.wait_for_log("tick")
    nsbox_container.pause()
    cpu, written = nsbox_container.stats().cpu, len(ticker.log())
    sum(range(3_000_000))
    assert (nsbox_container.stats().cpu, len(ticker.log())) == (cpu, written)
    nsbox_container.unpause()
    nsbox_container.wait_until(lambda: len(ticker.log()) > written)


@pytest.mark.parametrize("userns", [False, True])
def test_past_disk_there_is_no_space_left(nsbox_container_factory: Any, userns: bool) -> None:
    container = nsbox_container_factory(disk="8M", userns=userns)
    for path in ("/var/large", "/tmp/large", "/run/large", "/large"):
        result = container.run(f"head -c 20M /dev/zero > {path}", shell=True)
        assert result.returncode != 0
        assert "No space left on device" in result.stderr


def test_a_test_past_its_timeout_fails_saying_so(
    run_pytest: Callable[..., pytest.RunResult],
) -> None:
    result = run_pytest(
        """
        import time, pytest

        @pytest.mark.sandbox(timeout=1)
        def test_inside():
            time.sleep(1000)

        @pytest.mark.sandbox(timeout=1)
        def test_outside(nsbox_container):
            nsbox_container.run(["sleep", "1000"])
        """
    )
    result.assert_outcomes(failed=2)
    assert result.stdout.str().count("it outlived its timeout of 1 s") >= 2
