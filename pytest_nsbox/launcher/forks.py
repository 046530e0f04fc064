"""The process that inits are forked from, at work. It stays in the host's network namespace, and
dies with the launcher."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import struct
from _socket import socket as Socket

from pytest_nsbox import wire
from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.init.rehearsal import rehearse
from pytest_nsbox.init.setup import Kind, run_init
from pytest_nsbox.kernel import libc, namespaces, processes, userns

# a kernel may be without the second
_LEFT_BY_CHILDREN = [kind for kind in ("pid", "time") if os.path.exists(f"/proc/self/ns/{kind}")]
_FD = struct.Struct("i")
_TOLD = b'{"pid":%d}'


def live(launcher: socket.socket) -> None:
    """Fork what is asked for on a socket, until its other end is closed."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    libc.set_process_name("nsbox-zygote")
    os.chdir("/")  # who changes the root of an init takes along what is there (pivot_root(2))
    with contextlib.suppress(OSError):  # then each learns for itself
        rehearse()
    # for all inits, too: each call there would copy pages
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: wait(2), NOTES
    processes.close_all_but([launcher.fileno()])
    userns.is_complete(), userns.overflow_ids()  # for all inits, while /proc is to be seen
    line = Socket(fileno=launcher.detach())
    home = {kind: namespaces.open_namespace(kind) for kind in _LEFT_BY_CHILDREN}
    # by the requests for them, which need not be read again
    plain: dict[bytes, Kind] = {}
    others: dict[bytes, Kind] = {}
    # a collection in a child would write to, and so copy, every page with an object in it
    gc.collect()
    gc.freeze()
    gc.disable()
    while (received := _fork_plain_ones(line, plain, home["pid"])) is not None:
        payload, fds = received
        try:
            pid = _fork_any(payload, fds, plain, others, home)
            pidfd = os.pidfd_open(pid)
        except Exception as error:
            wire.send(line, {"error": wire.dump_error(error)})
        else:
            wire.send_bytes(line, _TOLD % pid, (pidfd,))
            os.close(pidfd)
        finally:
            wire.close_all(fds)


def _fork_plain_ones(
    line: Socket, plain: dict[bytes, Kind], own: int
) -> tuple[bytes, list[int]] | None:
    """Fork inits of kinds that have been asked for before, until something else is asked for, or
    no more: returns that.

    What is written to between two forks is copied for one of the two. So this goes by as few
    functions and objects as will do.
    """
    while True:
        payload, beside, found, _ = line.recvmsg(*wire.ONE_PACKET)
        if payload not in plain or not beside:
            return wire.unpack(payload, beside, found)
        (init_line,) = _FD.unpack_from(beside[0][2])
        try:
            pid = libc.fork_first(own)
            if pid == 0:
                try:
                    run_init(Socket(fileno=init_line), plain[payload])
                finally:
                    os._exit(1)
            pidfd = os.pidfd_open(pid)
            try:
                line.sendmsg([_TOLD % pid], [(*wire.RIGHTS, _FD.pack(pidfd))], wire.NOSIGNAL)
            finally:
                os.close(pidfd)
        except Exception as error:
            wire.send(line, {"error": wire.dump_error(error)})
        finally:
            os.close(init_line)


def _fork_any(
    payload: bytes,
    fds: list[int],
    plain: dict[bytes, Kind],
    others: dict[bytes, Kind],
    home: dict[str, int],
) -> int:
    kind = others.get(payload)
    if kind is None:
        message = wire.decode(payload)
        if "kind" not in message:
            return _fork_forwarder(int(message["forward"]), str(message["network"]), fds)
        kind = Kind.from_wire(message["kind"])
        is_plain = not kind.in_userns and kind.uptime is None
        (plain if is_plain else others)[payload] = kind
    return _fork(kind, fds[0], home)


def _fork_forwarder(port: int, network: str, fds: list[int]) -> int:
    def forward() -> None:
        from pytest_nsbox.launcher.forwarder import forward_to_loopback  # not for each init

        gc.enable()
        forward_to_loopback(fds[0], port, fds[1] if fds[1:] else None, network)

    return processes.fork_child("nsbox-port", fds, forward)


def _fork(kind: Kind, line: int, home: dict[str, int]) -> int:
    """Fork PID 1; later children of this process are not to be in its namespaces."""
    if kind.in_userns:
        return _fork_by_one_between(kind, line)
    try:
        return _fork_into_new(kind, line)
    finally:
        namespaces.return_to(home["pid"], libc.CLONE_NEWPID)
        if kind.uptime is not None and "time" in home:
            namespaces.return_to(home["time"], libc.CLONE_NEWTIME)


def _fork_into_new(kind: Kind, line: int, between: int | None = None) -> int:
    """Fork the first process of new PID and time namespaces."""
    libc.unshare(libc.CLONE_NEWPID)
    if kind.uptime is not None:
        _set_uptime(kind.uptime)
    pid = libc.fork()
    if pid == 0:
        try:
            run_init(Socket(fileno=line), kind, between)
        finally:
            os._exit(1)
    return pid


def _set_uptime(seconds: float) -> None:
    try:
        libc.unshare(libc.CLONE_NEWTIME)
        namespaces.set_uptime(seconds)
    except OSError as error:
        raise UnsupportedError(
            f"uptime={seconds:g}: the clocks of a time namespace cannot be set here: "
            f"{error.strerror}; it takes CAP_SYS_TIME (in a container: --cap-add SYS_TIME) and "
            "a kernel with time namespaces"
        ) from error


def _fork_by_one_between(kind: Kind, line: int) -> int:
    """The same where the zygote could not return: out of a new user namespace, whose own all the
    others must be, nobody can; to the host's PID namespace only the host's root can.

    So one between makes them, forks PID 1 and ends; the zygote, a subreaper, is then its parent.
    In a user namespace all ids are mapped to themselves: files keep their owners, and root inside
    has no capability outside.
    """
    ours, theirs = wire.pair()
    with ours, theirs:
        between = os.fork()
        if between == 0:
            ours.close()  # or it would wait for a zygote that has been killed
            _between(kind, line, theirs)
        theirs.close()
        try:
            if kind.own_userns:
                _map_ids(between, ours)
            return int(wire.reply_of(ours)[0]["pid"])
        finally:
            ours.close()
            with contextlib.suppress(ChildProcessError):  # the kernel has reaped it
                os.waitpid(between, 0)


def _map_ids(pid: int, asked: socket.socket) -> None:
    """When it is in its user namespace, give it the ids that there are here."""
    wire.reply_of(asked)
    for kind in ("uid", "gid"):
        with open(f"/proc/{pid}/{kind}_map", "w", encoding="ascii") as file:
            file.write(userns.onto_itself(kind))
    wire.send(asked, {})


def _between(kind: Kind, line: int, zygote: socket.socket) -> None:
    try:
        if kind.own_userns:
            libc.unshare(libc.CLONE_NEWUSER)
            wire.send(zygote, {})
            if wire.receive(zygote) is None:
                return
        own = os.pidfd_open(os.getpid())
        pid = _fork_into_new(kind, line, own)
        wire.send(zygote, {"pid": pid})
    except (NsboxError, OSError) as error:
        wire.send(zygote, {"error": wire.dump_error(error)})
    finally:
        os._exit(0)
