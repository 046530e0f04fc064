"""The process that inits are forked from: small, so that a fork has little to copy.

The launcher forks it before it imports what it needs itself. It stays in the host's network
namespace, and dies with the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
from _socket import socket as Socket
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_nsbox import wire
from pytest_nsbox.errors import ContainerDied, NsboxError, SetupError, UnsupportedError
from pytest_nsbox.init.rehearsal import rehearse
from pytest_nsbox.init.setup import Kind, run_init
from pytest_nsbox.kernel import libc, mounts, namespaces, processes, userns
from pytest_nsbox.kernel.mountinfo import MountWatch
from pytest_nsbox.kernel.namespaces import Home

# the namespaces that the launcher goes to: before the foundation is laid, and after that
VISITED, VISITED_AGAIN = ("mnt", "ipc", "uts", "net"), ("mnt", "uts")
# a kernel may be without the second
_LEFT_BY_CHILDREN = [kind for kind in ("pid", "time") if os.path.exists(f"/proc/self/ns/{kind}")]


class InitFailed(Exception):
    """What an init has said before it ended; its argument is as `wire.dump_error` has it."""


@dataclass
class Init:
    """One that has been forked."""

    pid: int
    pidfd: int
    line: socket.socket  # the launcher's to it
    root: int = -1  # where it is visited, once that is known
    foundation: object = None  # that has been laid for its file tree

    def close(self) -> None:
        self.line.close()
        wire.close_all([self.pidfd, self.root])


@dataclass
class _Ahead:
    """One that is being forked before it is asked for."""

    kind: Kind
    line: socket.socket
    mounted: object  # what was on the host when it was asked for: it has a copy of that
    init: Init | None = None  # once the zygote has been listened to


class Zygote:
    """The launcher's handle on it. It answers what it is asked in the order that it is asked in."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._socket = sock
        self._last: Kind | None = None
        self._ahead: _Ahead | None = None
        self._mounts = MountWatch()
        self.watch = select.epoll()  # has something to say when the one forked ahead has

    @classmethod
    def start(cls) -> Zygote:
        """Fork it off the calling process."""
        ours, theirs = wire.pair()
        pid = os.fork()
        if pid == 0:
            try:
                _live(theirs)
            finally:
                os._exit(0)
        theirs.close()
        return cls(pid, ours)

    def fork_init(self, kind: Kind, foundation: object) -> Init:
        """A new PID 1 that will be isolated, say so, and wait for its order; if it has been forked
        ahead the `foundation` may have been laid. Raises SetupError, or InitFailed."""
        self._last = kind
        if (init := self._take_ahead(kind, foundation)) is not None:
            return init
        line, theirs = wire.pair()
        with contextlib.ExitStack() as failed:
            failed.enter_context(line)  # an error that is kept would keep it open
            try:
                with theirs:
                    self._ask({"kind": kind.to_wire()}, [theirs.fileno()])
                pid, pidfd = self._told()
            except SetupError:
                word = last_word(line)  # it may have failed before it could be got hold of
                if word is not None:
                    raise InitFailed(word) from None
                raise
            except ContainerDied:
                raise SetupError("the process that inits are forked from has ended") from None
            failed.pop_all()
        return Init(pid, pidfd, line)

    def _ask(self, message: wire.Message, fds: list[int]) -> None:
        try:
            wire.send(self._socket, message, fds)
        except (BrokenPipeError, ConnectionResetError):
            raise ContainerDied(f"cannot fork: {wire.ENDED}") from None

    def _told(self) -> tuple[int, int]:
        """The pid and the pidfd of what it has forked. Raises an NsboxError."""
        reply, (pidfd,) = wire.reply_of(self._socket)
        return int(reply["pid"]), pidfd

    def may_fork_ahead(self) -> bool:
        """Whether the next init is likely to be one like the last, and is not there yet."""
        last = self._last
        # one with clocks of its own would have begun to count
        return self._ahead is None and last is not None and last.uptime is None

    def fork_ahead(self, *, visited: bool) -> None:
        """Have the next init forked, and in namespaces of its own, before it is asked for. Does
        not wait for it: where it can be `visited`, it can be watched for that."""
        if self._last is None:
            return
        kind, self._last = self._last, None
        with contextlib.suppress(OSError, ContainerDied):  # it is said when one is needed
            mounted = self._mounts.now()
            line, theirs = wire.pair()
            with theirs, contextlib.ExitStack() as failed:
                failed.enter_context(line)
                self._ask({"kind": kind.to_wire()}, [theirs.fileno()])
                failed.pop_all()
            self._ahead = _Ahead(kind, line, mounted)
            if visited and not kind.in_userns:
                self.watch.register(line, select.EPOLLIN)

    def ahead(self) -> Init | None:
        """The one forked ahead; None where there is none, or it could not be forked: the same will
        happen again, and be said."""
        ahead = self._ahead
        if ahead is not None and ahead.init is None:
            try:
                ahead.init = Init(*self._told(), ahead.line)
            except (NsboxError, OSError, ValueError):  # or no descriptor was left for its pidfd
                self._ahead = None
                self._unwatch(ahead.line)
                ahead.line.close()
                return None
        return None if ahead is None else ahead.init

    def lay_foundation(self, steps: Sequence[mounts.Step], home: Home) -> None:
        """Prepare the one forked ahead, which has just said that it is isolated, for its file
        tree."""
        init = self.ahead()
        if init is None:
            return
        try:
            init.root = apart_by(wire.receive(init.line))["root"]
            with home.away(dict.fromkeys(VISITED, init.pidfd), init.root):
                root = mounts.begin(steps)
            os.close(init.root)
            init.root, init.foundation = root, steps
        except (OSError, ValueError, LookupError):  # what is wrong is said when one is needed
            self.end_ahead()

    def _take_ahead(self, kind: Kind, foundation: object) -> Init | None:
        """The one forked ahead; None where it will not do."""
        ahead, init = self._ahead, self.ahead()
        if ahead is None or init is None:
            return None
        same = ahead.kind == kind and init.foundation in (None, foundation)
        if not same or ahead.mounted is not self._mounts.now() or wire.is_ready(init.pidfd, 0):
            self.end_ahead()
            return None
        self._ahead = None
        self._unwatch(init.line)
        return init

    def end_ahead(self) -> None:
        """Without an order it ends; wait until it has."""
        init, self._ahead = self.ahead(), None
        if init is not None:
            self._unwatch(init.line)
            init.line.close()
            wire.is_ready(init.pidfd, None)
            init.close()

    def _unwatch(self, line: socket.socket) -> None:
        # closing it is not enough while a fork of this process has it, too (epoll(7))
        with contextlib.suppress(FileNotFoundError):
            self.watch.unregister(line)

    def fork_forwarder(self, port: int, fds: list[int], network: str = "") -> int:
        """A process that forwards to a port of the host's loopback; returns a pidfd. `fds` are
        the listening socket and the table of who in `network` may come in. Raises SetupError."""
        self.end_ahead()  # whose answer would come first
        self._ask({"forward": port, "network": network}, fds)
        return self._told()[1]

    def close(self) -> None:
        """End it, and wait until it has ended."""
        self.end_ahead()
        self._socket.close()
        self.watch.close()
        os.waitpid(self._pid, 0)


def apart_by(received: tuple[wire.Message, list[int]] | None) -> dict[str, int]:
    """What an init that is isolated hands out of its namespaces, by what it is. Raises
    LookupError."""
    message, fds = received or ({}, [])
    return dict(zip(message["of"], fds, strict=True))


def last_word(line: socket.socket) -> wire.Message | None:
    """The error that one has ended with; None where it has said none."""
    with contextlib.suppress(BlockingIOError, ValueError):
        while received := wire.receive(line, flags=socket.MSG_DONTWAIT):
            message, fds = received
            wire.close_all(fds)
            if "error" in message:
                return dict(message["error"])
    return None


def _live(launcher: socket.socket) -> None:
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
    # a collection in a child would write to, and so copy, every page with an object in it
    gc.collect()
    gc.freeze()
    gc.disable()
    kinds: dict[bytes, Kind] = {}  # by the requests for them, which need not be read again
    while (received := wire.receive_bytes(line)) is not None:
        payload, fds = received
        try:
            if payload not in kinds and "kind" in (message := wire.decode(payload)):
                kinds[payload] = Kind.from_wire(message["kind"])
            if payload in kinds:
                pid = _fork(kinds[payload], fds[0], home)
            else:
                pid = _fork_forwarder(int(message["forward"]), str(message["network"]), fds)
            pidfd = os.pidfd_open(pid)
        except Exception as error:
            wire.send(line, {"error": wire.dump_error(error)})
        else:
            wire.send_bytes(line, b'{"pid":%d}' % pid, (pidfd,))
            os.close(pidfd)
        finally:
            wire.close_all(fds)


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
        run_init(Socket(fileno=line), kind, between)
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
