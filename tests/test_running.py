"""Commands and functions in a container, as `subprocess` has them."""

from __future__ import annotations

import hashlib
import inspect
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox import CallError, CommandError, Container, ContainerDied, NsboxError
from pytest_nsbox.session.process import Process


def test_output_is_captured_as_text(nsbox_container: Container) -> None:
    result = nsbox_container.run("echo out; echo err >&2", shell=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "out\n", "err\n")
    assert isinstance(result, subprocess.CompletedProcess)
    assert nsbox_container.run(["hostname"]).stdout.strip() == nsbox_container.hostname


def test_output_is_bytes_when_asked_for(nsbox_container: Container) -> None:
    result = nsbox_container.run(["printf", r"\377\0"], text=False)
    assert result.stdout == b"\xff\0"


def test_input_is_given(nsbox_container: Container) -> None:
    assert nsbox_container.run(["cat"], input="text\n").stdout == "text\n"
    assert nsbox_container.run(["cat"], input=b"\0\xff").stdout == b"\0\xff"
    assert nsbox_container.run(["cat"]).stdout == ""


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_statuses_are_right(nsbox_container: Container, code: int) -> None:
    result = nsbox_container.run(["sh", "-c", f"exit {code}"])
    assert (result.returncode, result.signal) == (code, None)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSEGV"])
def test_signals_are_right(nsbox_container: Container, name: str) -> None:
    number = getattr(signal, name)
    result = nsbox_container.run(["sh", "-c", f"kill -{number.value} $$"])
    assert (result.returncode, result.signal) == (-number, number)


def test_check_raises_with_the_end_of_the_output(nsbox_container: Container) -> None:
    with pytest.raises(subprocess.CalledProcessError, match=r"(?s)status 3.*the reason") as caught:
        nsbox_container.run("echo the reason >&2; exit 3", shell=True, check=True)
    assert isinstance(caught.value, CommandError)
    assert caught.value.stderr == "the reason\n"


def test_what_cannot_be_started_raises_as_subprocess_does(nsbox_container: Container) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        nsbox_container.run(["no-such-program"])
    with pytest.raises(PermissionError):
        nsbox_container.run(["/etc/passwd"])
    with pytest.raises(FileNotFoundError):
        nsbox_container.run(["true"], cwd="/nowhere")
    with pytest.raises(FileNotFoundError, match="no user 'nobody-here'"):
        nsbox_container.run(["true"], user="nobody-here")


@pytest.mark.parametrize("timeout", [None, 60])
def test_what_no_process_can_have_is_refused_and_the_container_lives(
    nsbox_container: Container, timeout: float | None
) -> None:
    with pytest.raises(ValueError, match="null byte"):
        nsbox_container.run(["true", "a\0b"], timeout=timeout)
    with pytest.raises(NsboxError, match="null byte"):
        nsbox_container.run(["true"], env={"A": "a\0b"}, timeout=timeout)
    with pytest.raises(NsboxError, match="uid"):
        nsbox_container.run(["true"], user=1 << 40, timeout=timeout)
    nsbox_container.run(["true"], check=True, timeout=timeout)


def test_a_timeout_kills_the_whole_tree(nsbox_container: Container) -> None:
    """Also what has left the session and lost its parent."""
    script = "echo begun; sleep 1001 & (setsid sh -c 'sleep 1002 & exec sleep 1003' &); sleep 1004"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        nsbox_container.run(script, shell=True, timeout=1)
    assert caught.value.stdout == "begun\n"
    alive = nsbox_container.run(["ps", "-eo", "comm", "--no-headers"]).stdout.split()
    assert sorted(alive) == ["nsbox-init", "ps"]


def test_a_timeout_leaves_other_commands_alone(nsbox_container: Container) -> None:
    other = nsbox_container.popen(["sleep", "1000"])
    with pytest.raises(subprocess.TimeoutExpired):
        nsbox_container.run(["sleep", "1000"], timeout=0.2)
    assert other.poll() is None


def test_in_time_a_timeout_changes_nothing(nsbox_container: Container) -> None:
    result = nsbox_container.run("echo fine; exit 7", shell=True, timeout=60)
    assert (result.returncode, result.stdout) == (7, "fine\n")
    with pytest.raises(FileNotFoundError):
        nsbox_container.run(["no-such-program"], timeout=60)


def test_100_megabytes_go_through_a_pipe_unharmed(nsbox_container: Container) -> None:
    data = os.urandom(1 << 20) * 100
    result = nsbox_container.run(["tee", "/dev/stderr"], input=data, text=False)
    wanted = hashlib.sha256(data).digest()
    assert hashlib.sha256(result.stdout).digest() == wanted
    assert hashlib.sha256(result.stderr).digest() == wanted


def test_the_environment_is_inherited_set_and_replaced(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(env={"FROM_SPEC": "1"})
    env = dict(line.split("=", 1) for line in container.run(["env", "-0"]).stdout.split("\0")[:-1])
    assert env["FROM_SPEC"] == "1"
    assert env["PATH"] == os.environ["PATH"]
    assert env["HOSTNAME"] == container.hostname
    assert container.run(["env"], env={"ONLY": "this"}).stdout == "ONLY=this\n"


def test_a_large_environment_arrives(nsbox_container: Container) -> None:
    env = {f"NAME{number}": "x" * 1000 for number in range(100)}
    lines = nsbox_container.run(["/usr/bin/env"], env=env, check=True).stdout.splitlines()
    assert sorted(lines) == sorted(f"{name}={value}" for name, value in env.items())


def test_the_directory_is_as_given(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(cwd="/usr")
    assert container.run(["pwd"]).stdout == "/usr\n"
    assert container.run(["pwd"], cwd="/etc").stdout == "/etc\n"


def test_the_user_is_as_given(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(user="nobody")
    assert container.run(["id", "-un"]).stdout == "nobody\n"
    assert container.run(["sh", "-c", "echo $HOME"]).stdout == "/nonexistent\n"
    assert container.run(["id", "-u"], user="root").stdout == "0\n"
    assert container.run(["sh", "-c", "id -u; id -g"], user="12:34").stdout == "12\n34\n"
    assert "Permission denied" in container.run(["cat", "/etc/shadow"]).stderr


def test_popen_gives_what_subprocess_gives(nsbox_container: Container) -> None:
    pipe = subprocess.PIPE
    with nsbox_container.popen(["cat"], stdin=pipe, stdout=pipe, text=True) as process:
        assert isinstance(process, subprocess.Popen)
        assert process.poll() is None
        assert process.pid > 1
        out, err = process.communicate("hello\n", timeout=10)
    assert (out, err, process.returncode) == ("hello\n", None, 0)


def test_a_process_can_be_signalled_and_waited_for(nsbox_container: Container) -> None:
    process = nsbox_container.popen(["sleep", "1000"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    process.terminate()
    assert nsbox_container.wait_until(process.poll, timeout=10) == -signal.SIGTERM
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.kill()  # once ended, this is nothing


def test_what_a_process_writes_is_kept(nsbox_container: Container) -> None:
    process = nsbox_container.popen("echo to stdout; echo to stderr >&2", shell=True)
    assert process.wait(10) == 0
    assert process.log() == "to stdout\nto stderr\n"


def test_usage_is_told(nsbox_container: Container) -> None:
    script = "x = bytearray(50 << 20); sum(range(5_000_000))"
    usage = nsbox_container.run(["python3", "-c", script], check=True).usage
    assert usage is not None
    assert usage.cpu > 0.05
    assert usage.wall >= 0.05
    assert usage.peak_memory > 50 << 20


def test_orphans_are_reaped(nsbox_container: Container) -> None:
    nsbox_container.run("(setsid true &) ; (setsid true &)", shell=True, check=True)
    nsbox_container.wait_until(
        lambda: "defunct" not in nsbox_container.run(["ps", "-ef"], check=True).stdout
    )


def test_a_function_runs_inside_and_its_result_comes_back(nsbox_container: Container) -> None:
    captured = {"key": [1, 2, 3]}

    def inside(more: int, *, name: str) -> tuple[Any, ...]:
        return os.uname().nodename, os.getppid(), captured["key"] + [more], name

    answer = nsbox_container.call(inside, 4, name="x")
    assert answer == (nsbox_container.hostname, 0, [1, 2, 3, 4], "x")


def test_an_exception_inside_is_raised_outside_with_its_traceback(
    nsbox_container: Container,
) -> None:
    def broken() -> None:
        raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason") as caught:
        nsbox_container.call(broken)
    assert "in broken" in "".join(caught.value.__notes__)


def test_what_cannot_be_brought_out_is_said(nsbox_container: Container) -> None:
    with pytest.raises(CallError, match="cannot be brought out"):
        nsbox_container.call(lambda: lambda: None)
    with pytest.raises(CallError, match="status 3"):
        nsbox_container.call(os._exit, 3)
    with pytest.raises(CallError, match="SIGTERM"):
        nsbox_container.call(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(CallError, match=r"within 0\.2 s"):
        nsbox_container.call(time.sleep, 1000, timeout=0.2)


def test_a_function_is_confined_as_commands_are(nsbox_container: Container) -> None:
    def parse(text: str) -> dict[str, str]:
        return {
            name: value for name, _, value in (line.partition(":\t") for line in text.splitlines())
        }

    function = parse(nsbox_container.call(Path("/proc/self/status").read_text))
    command = parse(nsbox_container.run(["cat", "/proc/self/status"]).stdout)
    for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp"):
        assert function[name] == command[name], name
    assert function["NoNewPrivs"] == "1"
    assert function["Seccomp"] == "2"


def test_text_and_bytes_are_written_and_read(nsbox_container: Container) -> None:
    nsbox_container.write_text("/tmp/text", "grüße\n")
    assert nsbox_container.read_bytes("/tmp/text") == "grüße\n".encode()
    nsbox_container.write_bytes("/tmp/bytes", b"\0\xff" * 1_000_000)
    assert nsbox_container.read_bytes("/tmp/bytes") == b"\0\xff" * 1_000_000
    nsbox_container.write_text("/tmp/bytes", "shorter")
    assert nsbox_container.read_text("/tmp/bytes") == "shorter"
    with pytest.raises(FileNotFoundError):
        nsbox_container.read_text("/tmp/none")


def test_a_killed_container_says_so(nsbox_container: Container) -> None:
    process = nsbox_container.popen(["sleep", "1000"])
    nsbox_container.kill()
    assert process.wait(10) == -signal.SIGKILL
    with pytest.raises(ContainerDied, match="has been killed"):
        nsbox_container.run(["true"])


def test_the_private_methods_of_popen_are_those_we_replace() -> None:
    """Process stands on four methods of the standard library that it does not promise."""
    wanted = (
        "self args executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags "
        "shell p2cread p2cwrite c2pread c2pwrite errread errwrite restore_signals gid gids uid "
        "umask start_new_session process_group"
    ).split()
    signature = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
    assert list(signature.parameters) == wanted
    for name in ("_wait", "_internal_poll", "_close_pipe_fds"):
        assert hasattr(subprocess.Popen, name)
    assert Process._wait is not subprocess.Popen._wait  # type: ignore[attr-defined]


def test_an_init_shares_nearly_all_of_its_memory(nsbox_container: Container) -> None:
    """Of what it was forked from; what it writes to is its own, and there may be a thousand."""
    lines = Path(f"/proc/{nsbox_container.pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {key: int(value.split()[0]) for key, value in (line.split(":") for line in lines)}
    assert sizes["Private_Dirty"] + sizes["Private_Clean"] < 1536
    assert sizes["Rss"] > 8192
