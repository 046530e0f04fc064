"""What would stay if a step of building, taking down or sweeping went wrong on the way."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import ContainerDied, Session, TeardownError, wire
from pytest_nsbox.init import setup
from pytest_nsbox.kernel import cgroup
from pytest_nsbox.launcher import forks, ledger
from pytest_nsbox.model.units import parse_size
from tests.audit import Snapshot


def dead_owner() -> dict[str, Any]:
    dead = subprocess.Popen(["true"])
    dead.wait()
    return {"pid": dead.pid, "start": 1, "boot": ledger.boot_id()}


def write_ledger(directory: Path, *rows: tuple[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    lines: list[Any] = [{"owner": dead_owner()}]
    lines += [{"made": kind, "value": value} for kind, value in rows]
    path = directory / "boot-1-1"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def refuse(directory: Path) -> contextlib.AbstractContextManager[None]:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


def test_what_cannot_be_swept_does_not_keep_the_rest_and_is_tried_again(tmp_path: Path) -> None:
    no_cgroup, layer = tmp_path / "no-cgroup", tmp_path / "layer"
    no_cgroup.mkdir()
    layer.mkdir()
    rows = tmp_path / "rows"
    path = write_ledger(rows, (ledger.LAYER, str(layer)), (ledger.CGROUP, str(no_cgroup)))
    assert ledger.sweep(rows) == [f"layer {layer}"]
    assert path.exists()
    no_cgroup.rmdir()
    assert ledger.sweep(rows) == []
    assert not rows.exists()


def test_a_ledger_whose_owner_lives_is_not_swept(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    living = ledger.Ledger(tmp_path / "rows")
    living.record(ledger.LAYER, str(layer))
    assert ledger.sweep(tmp_path / "rows") == []
    assert layer.exists()
    with pytest.raises(OSError, match="left behind: layer"):
        living.close()
    assert living.path.exists()


def test_a_parameter_that_could_not_be_put_back_stays_written_down_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = tmp_path / "forwarding"
    parameter.write_text("0\n")
    rows = ledger.Ledger(tmp_path / "rows")
    rows.set_sysctl(str(parameter), "1", contextlib.nullcontext)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_locked", refuse)
        with pytest.raises(PermissionError):
            rows.put_back_sysctls(contextlib.nullcontext)
    with pytest.raises(OSError, match=f"left behind: sysctl .*{parameter}"):
        rows.close()
    monkeypatch.setattr(ledger, "start_time", lambda pid: None)  # as if the owner had ended
    assert ledger.sweep(tmp_path / "rows")
    assert parameter.read_text().strip() == "0"
    assert not rows.path.exists()


def test_a_row_that_does_not_fit_is_an_error_and_leaves_the_others_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ledger.Ledger(tmp_path / "rows")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    with pytest.raises(OSError, match="No space left on device"):
        rows.record(ledger.LAYER, "/no/such/layer")
    monkeypatch.undo()
    rows.record(ledger.LAYER, str(tmp_path))
    assert [json.loads(line).get("value") for line in rows.path.read_text().splitlines()] == [
        None,
        str(tmp_path),
    ]


def test_two_who_sweep_at_once_do_no_harm(tmp_path: Path) -> None:
    layers = [tmp_path / f"layer{number}" for number in range(20)]
    for layer in layers:
        (layer / "upper").mkdir(parents=True)
    write_ledger(tmp_path / "rows", *((ledger.LAYER, str(layer)) for layer in layers))
    script = f"from pathlib import Path; from pytest_nsbox.launcher import ledger; \
        ledger.sweep(Path({str(tmp_path / 'rows')!r}))"
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for each in both:
        assert each.communicate()[1] == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_layer_of_any_depth_is_removed(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    here = os.open(".", os.O_RDONLY)
    os.chdir(layer)
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    os.fchdir(here)
    os.close(here)
    ledger.remove_layer(str(layer))
    assert not layer.exists()


def test_a_paused_container_is_taken_down_at_once(nothing_left: Snapshot) -> None:
    with Session() as session, session.container() as container:
        container.popen(["sleep", "1000"])
        container.pause()
        begin = time.monotonic()
        container.close()
        assert time.monotonic() < begin + 4


def test_a_container_that_nobody_waits_for_any_more_is_taken_down(
    nothing_left: Snapshot,
) -> None:
    """A test that is interrupted while its container is built never learns of it."""
    with Session() as session:
        with session.container() as first:
            ip = first.ip
            sent: list[wire.Message] = []
            request = session.request
            session.request = lambda op, fds=(), **fields: (  # type: ignore[method-assign]
                sent.append({"op": op, **fields}) or request(op, fds, **fields)
            )
            session.container().close()
        mine, theirs = wire.pair()
        mine.close()
        assert session._lifeline is not None
        wire.send(session._lifeline, sent[0], [theirs.fileno()])
        theirs.close()
        with session.container() as next_one:
            assert next_one.ip == ip


def test_who_makes_a_user_namespace_does_not_outlive_the_zygote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would hold the zygote's end of a line that the launcher waits at."""
    kind = setup.Kind(
        network=False, uptime=None, own_userns=True, in_userns=True, capabilities=None
    )
    told, tell = os.pipe()

    def be_killed(pid: int, asked: object) -> None:
        os.write(tell, b"%d" % pid)
        signal.raise_signal(signal.SIGKILL)

    monkeypatch.setattr(forks, "_map_ids", be_killed)
    pid = os.fork()
    if pid == 0:
        forks._fork_by_one_between(kind, tell)
    between = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    os.waitpid(pid, 0)
    try:
        pidfd = os.pidfd_open(between)
    except ProcessLookupError:
        return
    ended = wire.is_ready(pidfd, 5)
    if not ended:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert ended


def test_layers_are_removed_without_a_janitor(nothing_left: Snapshot) -> None:
    with Session() as session:
        session.describe()
        launcher = session._launcher
        assert launcher is not None
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        (janitor,) = (
            int(pid) for pid in children if "janitor" in Path(f"/proc/{pid}/comm").read_text()
        )
        for number in range(2):
            with session.container(memory="64M") as container:
                container.write_text("/etc/x", "x")
                if not number:
                    os.kill(janitor, 9)


def test_teardown_says_who_does_not_die_and_ends_within_its_time() -> None:
    """A process in a frozen cgroup of version 1 stands for one that hangs in the kernel."""
    freezer = Path("/sys/fs/cgroup/freezer")
    if not freezer.is_dir():
        pytest.xfail("version 2 alone kills what is frozen")
    group = freezer / f"stuck-{os.getpid()}"
    group.mkdir()
    session = Session()
    try:
        container = session.container()
        container.popen(["sleep", "1234"])
        stuck = ""
        while not stuck:  # a program's arguments are to be seen a moment after it has started
            for pid in filter(str.isdigit, os.listdir("/proc")):
                if b"sleep\x001234" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    stuck = pid
        (group / "cgroup.procs").write_text(stuck)
        (group / "freezer.state").write_text("FROZEN")
        begin = time.monotonic()
        with pytest.raises(Exception, match=rf"killed, but does not end: .*{stuck} \(sleep\)"):
            container.close()
        assert time.monotonic() < begin + 20
        with session.container() as usable:
            usable.run(["true"], check=True)
    finally:
        (group / "freezer.state").write_text("THAWED")
        session.close()
        group.rmdir()


def test_what_a_killed_launcher_has_left_is_removed_by_its_own_session(
    nothing_left: Snapshot,
) -> None:
    """Not only by the next one, or the last session of a machine would leave it for good."""
    session = Session()
    container = session.container(memory="64M", cpus=1)
    container.popen("setsid sleep 1000 & sleep 1000", shell=True)
    launcher = session._launcher
    assert launcher is not None
    (in_run,) = ledger.state_directory().glob(f"*-{launcher.pid}-*")
    assert [path for path, _, _ in os.walk("/sys/fs/cgroup") if in_run.name in path]
    os.kill(launcher.pid, 9)
    with pytest.raises(ContainerDied):
        container.stats()
    assert not in_run.exists()
    assert not [path for path, _, _ in os.walk("/sys/fs/cgroup") if in_run.name in path]
    with pytest.raises(ContainerDied):
        container.close()
    with pytest.raises(TeardownError, match="the launcher ended with status -9"):
        session.close()


def test_a_session_whose_launcher_was_killed_sweeps_at_its_end(nothing_left: Snapshot) -> None:
    session = Session()
    container = session.container(memory="64M", cpus=1)
    container._init.close()
    os.close(container.pidfd)
    launcher = session._launcher
    assert launcher is not None
    os.kill(launcher.pid, 9)
    with pytest.raises(TeardownError, match="the launcher ended with status -9"):
        session.close()
    nothing_left.must_equal_soon(2)


KILLED = """
import os, pytest_nsbox
session = pytest_nsbox.Session()
session.container(memory="64M", network="isolated").write_text("/etc/written", "x")
print(session._launcher.pid, flush=True)
os.kill(session._launcher.pid, 9)
os.kill(os.getpid(), 9)
"""


def test_a_layer_is_swept_after_a_reboot(nothing_left: Snapshot) -> None:
    """That empties /run, and every process has another number then; only disks stay."""
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    launcher = int(done.stdout)
    (in_run,) = ledger.state_directory().glob(f"*-{launcher}-*")
    for kind, value in ledger._Rows(in_run).left:
        if kind == ledger.CGROUP:
            cgroup.remove_tree(value)
    in_run.unlink()
    cache = ledger.cache_directory()
    (on_disk,) = ledger.layers_directory(cache).glob(f"*-{launcher}-*")
    (layer,) = (cache / "writable").glob(f"*-{launcher}-*")
    assert list(layer.rglob("written"))
    text = on_disk.read_text().replace(ledger.boot_id(), "of another boot")
    on_disk.write_text(text.replace(f'"pid": {launcher}', f'"pid": {os.getpid()}'))
    with Session() as session:
        session.describe()
    assert not layer.exists()
    assert not on_disk.exists()


def of_the_next_one(session: Session) -> list[Path]:
    """What has been made ahead of container 2."""
    assert session._launcher is not None
    (rows,) = ledger.state_directory().glob(f"*-{session._launcher.pid}-*")
    cgroups = [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith("/c2")]
    layer = ledger.cache_directory() / "writable" / f"{rows.name}-2"
    return [layer, *(path for path in cgroups if path.parent.name == f"nsbox-{rows.name}")]


def test_what_was_made_ahead_goes_with_a_killed_launcher(nothing_left: Snapshot) -> None:
    session = Session()
    session.container(memory="64M").close()
    ahead = of_the_next_one(session)
    assert len(ahead) > 1
    assert all(path.is_dir() for path in ahead)
    assert session._launcher is not None
    session._launcher.kill()
    with pytest.raises(TeardownError):
        session.close()
    assert not any(path.exists() for path in ahead)


@pytest.mark.parametrize("next_one", [{"memory": "64M"}, {"memory": "32M"}, {"pids": 9}, {}])
def test_one_that_is_unlike_the_last_does_not_get_what_was_made_for_one_like_it(
    next_one: dict[str, Any], nothing_left: Snapshot
) -> None:
    with Session() as session:
        session.container(memory="64M").close()
        layer, *cgroups = of_the_next_one(session)
        inodes = [path.stat().st_ino for path in cgroups]
        with session.container(**next_one) as container:
            like = next_one == {"memory": "64M"}
            assert layer.exists() or "memory" not in next_one
            assert ([path.stat().st_ino for path in cgroups if path.exists()] == inodes) == like
            limit = parse_size(next_one["memory"]) if "memory" in next_one else None
            assert container.stats().memory_limit == limit
            container.run(["true"], check=True)


def test_one_after_the_other_with_other_limits(nothing_left: Snapshot) -> None:
    """What was made for another one is still being removed when the next is made."""
    with Session() as session:
        for number in range(20):
            memory = (32 + number % 2) << 20
            with session.container(memory=memory) as container:
                container.write_text("/etc/written", str(number))
                assert container.stats().memory_limit == memory
                assert container.read_text("/etc/written") == str(number)
