"""Try something in a forked child, with a deadline, so that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from pytest_nsbox.errors import NsboxError
from pytest_nsbox.kernel import libc

_MOST = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt: a note where it worked, a reason where it did not."""

    works: bool
    text: str = ""


class Lacking(Exception):
    """What a probe raises when it has seen that something does not do what it should."""


def attempt_all(
    groups: Mapping[str, Callable[[], Iterator[Outcome]]], deadline: float
) -> dict[str, list[Outcome]]:
    """Run every group in a child of its own, all at once; returns what each has told.

    A group that is killed at the deadline (seconds from now), or that dies, has told less than
    it would. The child leads a process group, which is killed with it.
    """
    end = time.monotonic() + deadline
    children = {name: _start(function) for name, function in groups.items()}
    told = dict.fromkeys(groups, b"")
    poll = select.poll()
    names = {}
    for name, (_, pipe) in children.items():
        poll.register(pipe, select.POLLIN)
        names[pipe] = name
    while names and (left := end - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            data = os.read(fd, _MOST)
            told[names[fd]] += data
            if not data:
                poll.unregister(fd)
                del names[fd]
    for pid, pipe in children.values():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pipe)
    return {
        name: [Outcome(*json.loads(line)) for line in text.splitlines(keepends=True) if line[-1:]]
        for name, text in told.items()
    }


def _start(function: Callable[[], Iterator[Outcome]]) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(function, write)
    os.close(write)
    with contextlib.suppress(PermissionError):  # it has done so itself
        os.setpgid(pid, pid)
    return pid, read


def _child(function: Callable[[], Iterator[Outcome]], pipe: int) -> NoReturn:
    try:
        os.setpgid(0, 0)
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
        # a lock (flock(2)) that is held by a descriptor would outlive who is examined for
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 1 << 20)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for outcome in function():
            os.write(pipe, json.dumps([outcome.works, outcome.text]).encode() + b"\n")
    finally:
        os._exit(0)


def outcome_of(function: Callable[[], str | None]) -> Outcome:
    """Call it; what it raises is the reason why it does not work."""
    try:
        return Outcome(True, function() or "")
    except (NsboxError, Lacking) as error:
        return Outcome(False, str(error))
    except OSError as error:
        return Outcome(False, error.strerror or str(error))


def in_child(function: Callable[[], None]) -> None:
    """Call it in a fork. Raises Lacking with what it raised."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except OSError as error:
            os.write(write, (error.strerror or str(error)).encode())
        except BaseException as error:
            os.write(write, str(error).encode() or b"failed")
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        words = pipe.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    if words or status:
        raise Lacking(words or f"a child ended with {os.waitstatus_to_exitcode(status)}")
