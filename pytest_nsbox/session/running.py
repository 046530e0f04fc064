"""A command that is waited for: what it has written, how it ended, and its end where it has to be
brought about."""

from __future__ import annotations

import contextlib
import signal
import subprocess

from pytest_nsbox.errors import CommandError, NsboxError
from pytest_nsbox.model.results import Result
from pytest_nsbox.session import ending
from pytest_nsbox.session.process import UNTIL_KILLED, Process


def run_to_its_end(
    process: Process, input: str | bytes | None, timeout: float | None, *, check: bool
) -> Result:
    """The rest of `Container.run`, whose errors these are, when the command has been started."""
    with process:
        try:
            out, err = process.communicate(input, process.left())
        except subprocess.TimeoutExpired as expired:
            expired.timeout = timeout or 0
            with contextlib.suppress(TimeoutError):
                process.kill_tree(timeout=UNTIL_KILLED)
            try:
                expired.stdout, expired.stderr = process.communicate(timeout=UNTIL_KILLED)
            except subprocess.TimeoutExpired as again:
                expired.stdout, expired.stderr = again.stdout, again.stderr
                expired.add_note("some of what it has started could not be killed; it goes on")
            raise
        except BaseException:
            with contextlib.suppress(NsboxError, OSError):
                process.kill_tree(timeout=UNTIL_KILLED)
            raise
        finally:
            process.abandon()
    result = Result(
        process.args,
        process.returncode,
        out,
        err,
        oom_killed=_out_of_memory(process),
        usage=process.usage,
    )
    if check and result.returncode:
        error = CommandError(result.returncode, process.args, out, err)
        if result.oom_killed:
            container = process.container
            error.add_note(ending.out_of_memory(container.spec, container.state()))
        raise error
    return result


def _out_of_memory(process: Process) -> bool:
    """Only a kill can be one for memory: of the command, or of a shell's own child."""
    container = process.container
    if container.spec.memory is None or process.returncode not in (-signal.SIGKILL, 137):
        return False
    return bool(container.state()["reason"] == "memory")
