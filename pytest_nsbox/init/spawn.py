"""Starts commands.

By posix_spawn(3), which does not copy the caller's memory map and its pages, where that will do; a
command that is another user's, or has something to say before it is one, takes a fork.
`subprocess` does both, and more; but PID 1 would have a page of memory of its own for each object
that it goes through.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from pytest_nsbox import wire
from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.init.users import User, find_user
from pytest_nsbox.kernel import userns
from pytest_nsbox.wire import Message

# what Python ignores, and a command would, too
_BACK_TO_DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ)


def spawn(
    message: Message,
    stdio: Sequence[int],
    others: Sequence[int],
    before_exec: Callable[[], None] | None = None,
) -> int:
    """Start what an `exec` asks for, in a session of its own; returns its pid. `others` are
    descriptors that it has by their numbers. Raises OSError as execve(2) did."""
    args = [str(arg) for arg in message["args"]]
    env = {str(name): str(value) for name, value in message["env"].items()}
    user = None
    if message["user"] is not None:
        user = find_user(message["user"])
        _must_exist(user)
        if message.get("set_home"):
            env["HOME"] = user.home
        env.setdefault("HOME", user.home)
    cwd = str(message["cwd"])
    if message.get("cwd_optional") and not os.path.isdir(cwd):
        cwd = "/"
    for fd in others:
        os.set_inheritable(fd, True)  # they are closed here in a moment
    os.chdir(cwd)
    try:
        if user is None and before_exec is None:
            return _spawn(args, env, stdio)
        return _fork(args, env, stdio, user, before_exec)
    finally:
        os.chdir("/")


def _spawn(args: list[str], env: dict[str, str], stdio: Sequence[int]) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]

    def start(path: str) -> int:
        return os.posix_spawn(
            path, args, env, file_actions=actions, setsid=True, setsigdef=_BACK_TO_DEFAULT
        )

    return _first(start, args[0], env)


def _fork(
    args: list[str],
    env: dict[str, str],
    stdio: Sequence[int],
    user: User | None,
    before_exec: Callable[[], None] | None,
) -> int:
    told, tell = wire.pair()
    with told:
        with tell:
            pid = os.fork()
            if pid == 0:
                _become(args, env, stdio, user, before_exec, tell)
        refusal = wire.receive(told)
    if refusal is not None:  # or there is nobody any more who could say one
        os.waitpid(pid, 0)
        wire.raise_error(refusal[0])
    return pid


def _become(
    args: list[str],
    env: dict[str, str],
    stdio: Sequence[int],
    user: User | None,
    before_exec: Callable[[], None] | None,
    tell: socket.socket,
) -> NoReturn:
    try:
        os.setsid()
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        if user is not None:
            if userns.may_set_groups():
                os.setgroups([id for id in user.groups if userns.maps("gid", id)])
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
        if before_exec is not None:
            before_exec()
        for each in (*_BACK_TO_DEFAULT, signal.SIGCHLD):
            signal.signal(each, signal.SIG_DFL)
        _first(lambda path: os.execve(path, args, env), args[0], env)
    except Exception as error:
        wire.send(tell, wire.dump_failure(error))
    finally:
        os._exit(127)


def _first(start: Callable[[str], int], name: str, env: dict[str, str]) -> int:
    """Start the first of the files that a name may mean (execvp(3)) that can be."""
    refusal: OSError = FileNotFoundError(2, os.strerror(2), name)
    for path in _paths(name, env):
        try:
            return start(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if path == name:
                refusal = error
        except OSError as error:
            refusal = OSError(error.errno, error.strerror, name)
    raise refusal


def _paths(name: str, env: dict[str, str]) -> Iterator[str]:
    if "/" in name:
        yield name
        return
    for directory in env.get("PATH", os.defpath).split(":"):
        path = f"{directory}/{name}" if directory else name
        if os.path.exists(path):  # each try would be a process
            yield path


def _must_exist(user: User) -> None:
    """Raises UnsupportedError for one who is nobody here."""
    if not userns.maps("uid", user.uid) or not userns.maps("gid", user.gid):
        raise UnsupportedError(
            f"user {user.uid}:{user.gid} is not mapped in this container's user namespace: as an "
            "ordinary user without subordinate ids there is root alone; get some (usermod "
            "--add-subuids 100000-165535 --add-subgids 100000-165535 NAME, package uidmap) or run "
            "pytest as root"
        )
