"""A container, as a test holds it."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

from pytest_nsbox import wire
from pytest_nsbox.errors import ContainerDied, NsboxError, SpecError
from pytest_nsbox.model.limits import Limits, Stats
from pytest_nsbox.model.order import Order
from pytest_nsbox.model.results import Change, Result
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.model.spec import SandboxSpec
from pytest_nsbox.session import ending, files, ports, waiting
from pytest_nsbox.session.inside import Inside, call
from pytest_nsbox.session.process import Arguments, Process
from pytest_nsbox.session.running import run_to_its_end

if TYPE_CHECKING:
    from pytest_nsbox.session.python import Brought
    from pytest_nsbox.session.session import Session


class Container:
    """A running container. Made by `Session.container` or a fixture, never by hand.

    `name`, `hostname`; `ip` and `ip6` on its first network, None without one; `pid` of its PID 1
    as the host counts; `paused`; `spec`, what it was made from.
    """

    def __init__(
        self,
        session: Session,
        spec: SandboxSpec,
        order: Order,
        rootfs: Rootfs,
        brought: Brought | None,
        reply: wire.Message,
        fds: list[int],
    ) -> None:
        self.session = session
        self.spec = spec
        self.rootfs = rootfs
        self.brought = brought  # this Python, on an image
        self.name = order.name
        self.hostname = order.hostname
        self.id = int(reply["id"])
        self.pid = int(reply["pid"])
        first = (reply["addresses"] or [[None, None, None]])[0]
        self.ip: str | None = first[0]
        self.ip6: str | None = first[1]
        self.addresses: list[tuple[str, str, int]] = [tuple(row) for row in reply["addresses"]]
        self.processes: list[Process] = []
        self.bodies: list[Inside] = []  # forks of this process that are at work inside
        self._init = socket.socket(fileno=fds[0])
        self.pidfd = fds[1]
        # what a fork needs to enter it, and its descriptors, where one has been foreseen
        self._way_in = (reply["way_in"], fds[2:]) if "way_in" in reply else None
        self.paused = False
        self._owner = os.getpid()
        self.closed = False
        self._used = False  # something has run in it
        self._last: wire.Message | None = None
        self.unyielding: list[str] = []  # who has not ended when asked to

    def __repr__(self) -> str:
        return f"<Container {self.name} {self.ip or 'without network'}>"

    # ------------------------------------------------------------------ life

    def close(self, *, wait: bool = True) -> None:
        """Take it down, with everything in it. A second time does nothing.

        Without `wait` it will be killed, and this returns before that; what then goes wrong is
        raised when the session is closed.
        """
        if self.closed or os.getpid() != self._owner:
            return
        self.closed = True
        try:
            # PID 1 cannot end before those are reaped, and they are this process's children
            for body in list(self.bodies):
                if wait:
                    body.kill()
                else:
                    body.signal(signal.SIGKILL)
            self.session.unreaped += self.bodies
            if wait:
                self._last, _ = self.session.request("destroy", id=self.id, later=False)
            else:
                self.session.destroy_later(self)
        finally:
            self._init.close()
            os.close(self.pidfd)
            if self._way_in is not None:
                wire.close_all(self._way_in[1])
            for process in self.processes:
                process.abandon()
            self.session.release_name(self.name)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def kill(self) -> None:
        """Kill every process in it, at once. Its last state can still be asked for."""
        self._last, _ = self.session.request("kill", id=self.id)

    def stop(self, timeout: float = 10) -> None:
        """Ask every process in it to end, by SIGTERM, and kill what is left after `timeout`
        seconds; its summary names those. Its last state can still be asked for."""
        late = False
        try:
            self.request_init({"op": "terminate"}, timeout=timeout)
        except TimeoutError:
            late = True
        except ContainerDied:
            pass
        reply, _ = self.session.request("kill", id=self.id, reason="stopped", tell=late)
        self._last, self.unyielding = reply, reply.get("running", [])

    def pause(self) -> None:
        """Stop every process where it is (cgroups(7), freezer), PID 1 as well: what is asked of
        it, such as to start another, is done after `unpause`."""
        self.session.request("freeze", id=self.id, frozen=True)
        self.paused = True

    def unpause(self) -> None:
        """Let the processes go on."""
        self.session.request("freeze", id=self.id, frozen=False)
        self.paused = False

    def update(self, **limits: Any) -> None:
        """Change limits of the running container: cpus, cpuset, memory, swap, pids, io."""
        unknown = set(limits) - set(vars(Limits()))
        if unknown:
            raise SpecError(
                f"update cannot change {sorted(unknown)[0]!r}; it can change "
                + ", ".join(vars(Limits()))
            )
        for key, value in limits.items():
            if value is None:
                raise SpecError(
                    f"{key}=None: a limit can be changed, not lifted; give a larger one"
                )
        self.spec = self.spec.replace(**limits)
        changed = {key: value for key, value in vars(self.spec.limits()).items() if key in limits}
        self.session.request("update", id=self.id, limits=changed)

    def stats(self) -> Stats:
        """What it has used so far; also after it has died."""
        state = self.state()
        if state["stats"] is None:
            raise NsboxError(f"container {self.name!r} has no control group to count for it")
        return Stats(**state["stats"])

    def state(self) -> wire.Message:
        """Whether it is alive, why not, and its statistics, as the launcher has them."""
        if not self.closed:
            self._last, _ = self.session.request("state", id=self.id)
        else:
            self.session.hear()
        return self._last or {"alive": False, "reason": "", "stats": None}

    def note_end(self, last: wire.Message) -> None:
        """What there is to say of it from now on, as it has been taken down."""
        self._last = last

    def death(self, patience: float = 0) -> NsboxError | None:
        """Why it is dead; None while it lives.

        When all of a container is killed, its processes go before its PID 1 does: `patience` is
        how many seconds to wait for that.
        """
        return ending.reason(self, patience)

    def settle(self) -> NsboxError | None:
        """Ask for its state while it can be asked for; returns why it is dead, if it is."""
        try:
            return self.death()
        except NsboxError as error:
            return error

    def summary(self) -> str:
        """Its state and the end of what ran in it, for a report."""
        return ending.summary(self)

    def way_in(self) -> tuple[wire.Message, list[int]]:
        """What a fork of this process needs to enter it. Raises ContainerDied."""
        found, self._way_in = self._way_in, None
        return found or self.session.request("enter", id=self.id)

    def why_dead(self) -> NsboxError:
        try:
            return self.death() or ContainerDied(f"container {self.name!r} does not answer")
        except NsboxError as error:
            return error

    # ------------------------------------------------------------------ init

    def ask_init(self, message: wire.Message, fds: list[int]) -> None:
        """Send init a request whose first descriptor the answers come back on."""
        if self.closed:
            raise self.why_dead()
        if not self._used:
            self._used = True
            self.session.use(self.id)
        try:
            wire.send(self._init, message, fds)
        except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError):
            raise self.why_dead() from None

    def request_init(self, message: wire.Message, timeout: float | None = None) -> list[int]:
        """Ask init and wait. Raises OSError as it was raised inside, TimeoutError."""
        mine, theirs = wire.pair()
        with mine:
            with theirs:
                line = self._init.fileno()
                if timeout is not None and not wire.is_ready(line, timeout, select.POLLOUT):
                    raise TimeoutError
                self.ask_init(message, [theirs.fileno()])
            mine.settimeout(timeout)
            try:
                _, fds = wire.reply_of(mine)
            except ContainerDied:
                raise self.why_dead() from None
        return fds

    # ------------------------------------------------------------------ commands

    def popen(
        self,
        args: Arguments,
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        shell: bool = False,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        bufsize: int = -1,
        pass_fds: tuple[int, ...] = (),
    ) -> Process:
        """Start a command and return at once (`subprocess.Popen`).

        What it writes is kept for its `log`, unless `stdout` and `stderr` say otherwise. `env`
        replaces the whole environment; `user` is as in `docker run --user`.

        Raises OSError as the start inside did (FileNotFoundError, PermissionError), or
        ContainerDied.
        """
        process = Process(
            self,
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            user=user,
            shell=shell,
            text=text,
            encoding=encoding,
            errors=errors,
            bufsize=bufsize,
            pass_fds=pass_fds,
        )
        self.processes.append(process)
        return process

    def run(
        self,
        args: Arguments,
        *,
        stdin: int | IO[Any] | None = None,
        input: str | bytes | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
        check: bool = False,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        shell: bool = False,
        text: bool | None = True,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> Result:
        """Run a command and wait for it (`subprocess.run`); output is captured, as text.

        `timeout` is in seconds; past it the command and all that it has started are killed.

        Raises CommandError (a `subprocess.CalledProcessError`) with `check`,
        `subprocess.TimeoutExpired`, OSError as the start inside did, or ContainerDied when the
        container was dead before.
        """
        if isinstance(input, bytes) and text:
            text = None if encoding is None and errors is None else text
        if input is not None:
            if stdin is not None:
                raise ValueError("stdin and input cannot both be given")
            stdin = subprocess.PIPE
        process = Process(
            self,
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            user=user,
            shell=shell,
            text=text,
            encoding=encoding,
            errors=errors,
            timeout=timeout,
        )
        return run_to_its_end(process, input, timeout, check=check)

    def call(
        self, function: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> Any:
        """Run a Python function inside and return its result or raise its exception.

        The function runs in a fork of this process that has entered the container: it sees the
        test's variables and modules, and the container's files, network and processes. Raises
        CallError when it ends without a result.
        """
        if not self.rootfs.is_host:
            raise NsboxError(
                "call needs the host's Python inside, so rootfs='host'; use run() with this image"
            )
        return call(self, function, args, kwargs, timeout)

    # ------------------------------------------------------------------ network

    def connect(self, port: int, *, timeout: float | None = 10) -> socket.socket:
        """A TCP connection to a port inside, as a neighbour on its network makes it.

        A server that listens on the container's own loopback only is reached there. `timeout`,
        in seconds, is for connecting. Raises OSError (ConnectionRefusedError) or ContainerDied.
        """
        return ports.connect(self, port, timeout)

    def publish(self, port: int, host_port: int = 0) -> tuple[str, int]:
        """Make a port of the container reachable on the host's loopback.

        Returns (host, port) there; `host_port` 0 lets the host choose. It ends with the
        container. Raises OSError (EADDRINUSE).
        """
        return ports.publish(self, port, host_port)

    def expose_host(self, port: int) -> tuple[str, int]:
        """Make a TCP server of the test, on the host's loopback, reachable from inside.

        Returns (host, port) there: the gateway of its first network and the same port, also
        where there is no way out; the names `host.nsbox.internal` and, as elsewhere,
        `host.docker.internal` and `host.testcontainers.internal` stand for that host. With
        `network="none"` it is the container's own loopback. Its neighbours are refused. Nothing
        else of the host's loopback is reachable, and this only until the container ends.

        The server need not listen yet. Raises OSError (EADDRINUSE) with `network="none"`.
        """
        return ports.expose_host(self, port)

    def wait_for_port(
        self, port: int, *, process: Process | None = None, timeout: float = 30
    ) -> None:
        """Wait until something inside listens on a TCP port.

        Fails at once when `process`, or the last one that `popen` has started, dies first.
        Raises WaitError, with the last that the process wrote.
        """
        waiting.for_port(self, port, process, timeout)

    def wait_until(
        self,
        condition: Callable[[], Any],
        *,
        process: Process | None = None,
        timeout: float = 30,
    ) -> Any:
        """Call `condition` until it returns something true, which is returned.

        Raises WaitError after `timeout` seconds, and at once when the container dies or, where
        it is given, `process` does, with the last that it wrote.
        """
        return waiting.until(self, condition, process, timeout)

    def wait_for_log(
        self, text: str, *, process: Process | None = None, timeout: float = 30
    ) -> str:
        """Wait until a process has written a line that has `text` in it, and return the line.

        `process` is the last one that `popen` has started, unless given. Fails at once when it
        dies first. Raises WaitError, with the last that it wrote.
        """
        return waiting.for_log(self, text, process, timeout)

    # ------------------------------------------------------------------ files

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o644) -> int:
        """open(2) inside, by init; returns a descriptor. Raises OSError as inside."""
        message: wire.Message = {
            "op": "open",
            "path": os.path.join("/", os.fspath(path)),
            "flags": flags,
            "mode": mode,
        }
        (fd,) = self.request_init(message)
        return fd

    def read_bytes(self, path: str | os.PathLike[str]) -> bytes:
        """The content of a file inside. Raises OSError as inside."""
        with os.fdopen(self.open(path, os.O_RDONLY), "rb") as file:
            return file.read()

    def read_text(self, path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
        """The content of a file inside, as text. Raises OSError as inside."""
        return self.read_bytes(path).decode(encoding)

    def write_bytes(self, path: str | os.PathLike[str], data: bytes) -> None:
        """Write a file inside, its old content replaced. Raises OSError as inside."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(self.open(path, flags), "wb") as file:
            file.write(data)

    def write_text(self, path: str | os.PathLike[str], text: str, encoding: str = "utf-8") -> None:
        """Write a text file inside, its old content replaced. Raises OSError as inside."""
        self.write_bytes(path, text.encode(encoding))

    def copy_in(
        self,
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        *,
        archive: bool = False,
    ) -> list[str]:
        """Copy a file or a whole tree of the host into the container, as `docker cp`.

        Where `dst` is a directory the copy is put into it under its own name, else `dst` is the
        copy itself; its missing parents are made. A `src` that ends in `/.` stands for what is in
        it. A file that is there is replaced, a directory merged with. Modes, times and symbolic
        links are kept, links as links; the copy is root's, with `archive` its owner's.

        Returns the paths that were left out: sockets, FIFOs, devices. Raises OSError.
        """
        return files.copy_in(self, src, dst, archive=archive)

    def copy_out(
        self,
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        *,
        archive: bool = False,
    ) -> list[str]:
        """Copy a file or a whole tree of the container to the host, as `docker cp`.

        `src` and `dst` mean what they mean to `copy_in`. No link made inside leads the copy out
        of `dst`. It belongs to the user who runs the test, with `archive` to its owner; a set-uid
        or set-gid bit does not come out.

        Returns the paths that were left out: sockets, FIFOs, devices. Raises OSError.
        """
        return files.copy_out(self, src, dst, archive=archive)

    def snapshot(self) -> Rootfs:
        """Freeze what has been written, to start other containers from: `rootfs=` takes it.

        It has all that the container shows but for what is on `mounts`, on the host, or the
        kernel's; /tmp and /run are kept, processes are not. They stand still while the copy is
        made, and go on. Whatever becomes of this container, the snapshot stays until the session
        ends. Also a container that was killed, or began from a snapshot, can be frozen.

        Raises ContainerDied when it has been taken down, UnsupportedError, OSError (ENOSPC).
        """
        try:
            reply, _ = self.session.request("snapshot", id=self.id)
        except ContainerDied as error:
            raise (self.death() or error) from None
        frozen = {path: tuple(found) for path, found in self.rootfs.frozen.items()}
        for path, directory in reply["frozen"].items():
            frozen[path] = (*frozen.get(path, ()), str(directory))
        return dataclasses.replace(
            self.rootfs,
            source=f"snapshot of {self.name}",
            frozen=frozen,
            by_directory=bool(reply["by_directory"]),
        )

    def changes(self) -> list[Change]:
        """What has been written, against the root filesystem that it was made from.

        Like `docker diff`, sorted by path, also after everything in it has ended or was killed.
        A directory is `changed` when its own mode, owner or attributes are, not for what is in
        it; a deleted one is one entry; a file that was opened to be written and was not is none.
        /tmp and /run are a container's own and start empty. What is below /dev, /proc and /sys,
        on `mounts` or on the host is not listed, nor what nsbox has put there itself.

        Raises ContainerDied when it has been taken down.
        """
        found = []
        try:
            for message in self.session.replies("changes", id=self.id):
                found += [Change(path, kind) for path, kind in message["rows"]]
        except ContainerDied as error:
            raise (self.death() or error) from None
        return sorted(found, key=lambda change: change.path)
