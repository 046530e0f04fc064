"""PID 1 at work: reap every process, start what is asked for, answer when it ends.

All that is imported here is imported before the fork: inside, the host's Python library may be
out of sight.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import gc
import os
import select
import signal
import time
from _socket import socket as Socket
from collections.abc import Callable
from dataclasses import dataclass, field

from pytest_nsbox import wire
from pytest_nsbox.init.spawn import spawn
from pytest_nsbox.kernel import libc
from pytest_nsbox.wire import Message


@dataclass
class _Child:
    answer: int  # the socket that its end is told on
    started: float


@dataclass
class Server:
    """What PID 1 knows: its children, and who waits for them."""

    children: dict[int, _Child] = field(default_factory=dict)
    ending: list[int] = field(default_factory=list)  # sockets to tell when there is none left

    def reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                while self.ending:
                    fd = self.ending.pop()
                    _answer(fd, {})
                    os.close(fd)
                return
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child is not None:
                _answer(child.answer, _ended(status, usage, child.started))
                os.close(child.answer)

    def handle(self, message: Message, fds: list[int]) -> None:
        """Do what a request asks. Its first descriptor is where the answer goes."""
        answer = fds.pop(0)
        try:
            operation = _OPERATIONS[str(message.get("op"))]
            if operation(self, message, fds, answer):
                answer = -1
        except Exception as error:  # whatever it is, PID 1 has to go on
            _answer(answer, wire.dump_failure(error))
        finally:
            wire.close_all(fds)
            if answer >= 0:
                os.close(answer)

    def exec(self, message: Message, fds: list[int], answer: int) -> bool:
        """Start a command; the first answer has its pid, the second how it ended."""
        stdin, stdout, stderr, *others = fds
        started = time.monotonic()
        if message.get("tree"):
            pid = self._exec_under_reaper(message, fds, answer)
        else:
            pid = spawn(message, [stdin, stdout, stderr], others)
            _answer(answer, {"started": pid})
        self.children[pid] = _Child(answer, started)
        return True

    def _exec_under_reaper(self, message: Message, fds: list[int], answer: int) -> int:
        """Start it below a reaper of its own, where every process it leaves behind stays."""
        go, let_go = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            status = 127
            try:
                os.close(let_go)
                os.read(go, 1)
                os.close(go)
                status = _reaper(message, fds, answer)
            finally:
                os._exit(status)
        _answer(answer, {"reaper": pid})
        os.close(let_go)
        os.close(go)
        return pid

    def kill(self, message: Message, fds: list[int], answer: int) -> bool:
        """Send a signal to a command that has not been reaped: no other can be meant."""
        pid = int(message["pid"])
        if pid in self.children:
            os.kill(pid, int(message["signal"]))
        _answer(answer, {})
        return False

    def kill_tree(self, message: Message, fds: list[int], answer: int) -> bool:
        """SIGKILL for all that a command has started; who is left is none.

        `pid` is its reaper or itself. `session` is its own session (setsid(2)), by which those
        are known that have killed their reaper.
        """
        root, session = int(message["pid"]), int(message.get("session", 0))
        for _ in range(1000):
            alive = _descendants(root, session)
            if not alive:
                break
            for pid in alive:
                _kill(pid)
        else:
            raise OSError(16, f"processes below {root} appear faster than they can be killed")
        _kill(root)
        _answer(answer, {})
        return False

    def terminate(self, message: Message, fds: list[int], answer: int) -> bool:
        """SIGTERM for every process but this one; the answer comes when all have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGTERM)
        self.ending.append(answer)
        self.reap()
        return True

    def open(self, message: Message, fds: list[int], answer: int) -> bool:
        """open(2) inside; the descriptor comes back."""
        path, flags = str(message["path"]), int(message["flags"])
        if message.get("parents"):
            os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY, int(message.get("mode", 0o644)))
        try:
            _answer(answer, {}, fd)
        finally:
            os.close(fd)
        return False

    def socket(self, message: Message, fds: list[int], answer: int) -> bool:
        """A socket of the container's network namespace."""
        sock = Socket(int(message["family"]), int(message["type"]))
        try:
            _answer(answer, {}, sock.fileno())
        finally:
            sock.close()
        return False

    def hosts(self, message: Message, fds: list[int], answer: int) -> bool:
        """New names in /etc/hosts."""
        with open("/etc/hosts", "w", encoding="utf-8") as file:
            file.write(str(message["text"]))
        _answer(answer, {})
        return False


_OPERATIONS: dict[str, Callable[[Server, Message, list[int], int], bool]] = {
    "exec": Server.exec,
    "kill": Server.kill,
    "kill_tree": Server.kill_tree,
    "open": Server.open,
    "socket": Server.socket,
    "terminate": Server.terminate,
    "hosts": Server.hosts,
}


def serve(launcher: Socket, session: Socket) -> None:
    """Work until the launcher closes its end."""
    server = Server()
    gc.enable()  # for what is new; what the zygote had stays frozen
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    # not signal.signal, which looks both up in enumerations, and so writes to thirty pages
    _signal.signal(signal.SIGCHLD, lambda *_: None)
    launcher.setblocking(False)
    session.setblocking(False)
    poll = select.poll()
    poll.register(launcher, select.POLLIN)
    poll.register(session, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if woken in ready:
            os.read(woken, 4096)
            server.reap()
        # the launcher's requests come first: it may have answered the session already
        if not _drain(launcher, server):
            return
        if session.fileno() in ready and not _drain(session, server, most=1):
            poll.unregister(session)
            session.close()
            ready.clear()


def _drain(sock: Socket, server: Server, most: int = 64) -> bool:
    """Handle what has arrived; False at the end of file."""
    if sock.fileno() < 0:
        return True
    for _ in range(most):
        try:
            received = wire.receive(sock)
        except BlockingIOError:
            return True
        except ValueError:
            continue
        except OSError:
            return False
        if received is None:
            return False
        message, fds = received
        if fds:
            server.handle(message, fds)
    return True


def _answer(fd: int, message: Message, *fds: int) -> None:
    """Answer, if anybody still waits."""
    sock = Socket(fileno=fd)
    try:
        wire.send(sock, message, fds)
    except OSError:
        return
    finally:
        sock.detach()


def _reaper(message: Message, fds: list[int], answer: int) -> int:
    """Run one command as the subreaper of all that descends from it (prctl(2))."""
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    started = time.monotonic()
    stdin, stdout, stderr, *others = fds

    def say_who() -> None:
        # before it is a command, which may kill its reaper as soon as it runs
        _answer(answer, {"pid": os.getpid()})

    try:
        main = spawn(message, [stdin, stdout, stderr], others, say_who)
    except Exception as error:
        _answer(answer, wire.dump_failure(error))
        return 127
    wire.close_all(fds)
    _answer(answer, {"started": main})
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return 0
        if pid == main:
            _answer(answer, _ended(status, usage, started))


def _ended(status: int, usage: object, started: float) -> Message:
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "user": getattr(usage, "ru_utime", 0.0),
        "system": getattr(usage, "ru_stime", 0.0),
        "peak": getattr(usage, "ru_maxrss", 0) * 1024,
        "wall": time.monotonic() - started,
    }


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _descendants(root: int, session: int = 0) -> set[int]:
    """The living processes below `root`, and those of a session and below them
    (proc_pid_stat(5)): zombies do not count."""
    parents: dict[int, tuple[int, str]] = {}
    below = {root}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        parents[int(name)] = (int(fields[1]), fields[0].decode())
        if session and int(fields[3]) == session:
            below.add(int(name))
    while True:
        more = {pid for pid, (parent, _) in parents.items() if parent in below} - below
        if not more:
            break
        below |= more
    return {pid for pid in below - {root} if parents[pid][1] not in "ZX"}
