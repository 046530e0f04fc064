"""A session: one launcher, and the containers and networks it has made."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nsbox import wire
from pytest_nsbox.errors import (
    ContainerDied,
    NsboxError,
    RootfsError,
    SpecError,
    TeardownError,
    UnsupportedError,
    not_linux,
)
from pytest_nsbox.model.addressing import DEFAULT_SUBNET, parse_subnet
from pytest_nsbox.model.rootfs import Rootfs
from pytest_nsbox.model.spec import SandboxSpec
from pytest_nsbox.session.container import Container
from pytest_nsbox.session.network import Network
from pytest_nsbox.session.order import make_order

if TYPE_CHECKING:
    from pytest_nsbox.rootfs import LayerCache
    from pytest_nsbox.session.inside import Inside
    from pytest_nsbox.session.python import Brought

UPLINKS = ("auto", "veth", "pasta", "slirp4netns", "none")
_KILLED = 0.5  # seconds in which one that does not answer has been killed, if it has
_TEARDOWN = 30.0  # seconds until a launcher that does not end is an error


class Session:
    """Containers for as long as it is open.

    `subnet` is the default network's, `uplink` how containers reach the outside, `cache` the
    directory of unpacked images. `spec` gives the defaults of every container. Up to `pool`
    containers like those that there were are made ahead, while others are in use. Nothing is
    started before it is entered or first used; what it has made is taken down when it is closed,
    and also when this process dies.
    """

    def __init__(
        self,
        *,
        subnet: str = DEFAULT_SUBNET,
        uplink: str = "auto",
        cache: str | os.PathLike[str] | None = None,
        spec: SandboxSpec | None = None,
        pool: int = 0,
        resolve_rootfs: Callable[[str], Rootfs | None] | None = None,
    ) -> None:
        parse_subnet(subnet)
        if uplink not in UPLINKS:
            raise SpecError(f"uplink {uplink!r} is not one of {', '.join(UPLINKS)}")
        self.subnet = subnet
        self.uplink = uplink
        if pool < 0:
            raise SpecError(f"pool={pool}: a number of containers, 0 for none")
        self.spec = spec or SandboxSpec()
        self.pool = pool
        self._cache = os.fspath(cache) if cache is not None else _cache_directory()
        self._resolve_rootfs = resolve_rootfs
        self._launcher: subprocess.Popen[bytes] | None = None
        self._lifeline: socket.socket | None = None
        self._words: Any = None  # what the launcher has to say on its standard error
        self._owner = 0
        self._swept = False  # what a killed launcher has left
        self._names: set[str] = set()
        self.unreaped: list[Inside] = []  # killed children of this process
        self._living: dict[str, Container] = {}
        self._used: set[int] = set()  # containers whose first use the launcher has not been told of
        # containers of whose end nobody has heard, who is to be told, and on what
        self._unheard: list[tuple[Container, int, socket.socket]] = []
        self._late: list[NsboxError] = []  # what went wrong with that
        self._networks = 0
        self._layers: LayerCache | None = None
        self._pythons: dict[tuple[str, ...], Brought | str] = {}  # on images; a text: why not

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Start the launcher in the background, if it is not running."""
        if self._launcher is not None:
            return
        check_host()
        self._owner = os.getpid()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as we do
        ours, theirs = wire.pair()
        options = {
            "subnet": self.subnet,
            "uplink": self.uplink,
            "cache": self._cache,
            "pool": self.pool,
        }
        command = [sys.executable, "-P", "-m", "pytest_nsbox.launcher"]
        with theirs:
            self._launcher = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=[theirs.fileno()],
                env={**os.environ, wire.MARK: os.urandom(8).hex()},
                start_new_session=True,
            )
        self._lifeline = ours

    def close(self) -> None:
        """Take everything down and wait until it is. Raises TeardownError for what stays.

        In a forked child this does nothing: the parent's containers are not the child's.
        """
        if self._launcher is None or os.getpid() != self._owner:
            return
        self.reap()
        launcher, self._launcher = self._launcher, None
        assert self._lifeline is not None
        self._lifeline.close()
        if self._layers is not None:
            self._layers.close()
            self._layers = None
        self._pythons.clear()
        try:
            in_time = launcher.returncode is not None or _ends(launcher.pid, _TEARDOWN)
            if not in_time:
                launcher.kill()
            status = launcher.wait()
            if not in_time:
                raise TeardownError(
                    f"the launcher has not ended within {_TEARDOWN:.0f} s and was killed"
                )
        finally:
            words = self._said()
            self._words.close()
            self.hear()
            late, self._late = self._late, []
        if status < 0:
            self._sweep()
        if status:
            raise TeardownError(words or f"the launcher ended with status {status}")
        if late:
            error = TeardownError(str(late[0]))
            for later in late[1:]:
                error.add_note(f"then {later}")
            raise error

    def _sweep_after_kill(self) -> None:
        """Not only the next session is to remove what a killed launcher could not."""
        launcher = self._launcher
        if launcher is None or os.getpid() != self._owner or not _ends(launcher.pid, _KILLED):
            return
        if launcher.wait() < 0:
            self._sweep()

    def _sweep(self) -> None:
        if self._swept:
            return
        self._swept = True
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [sys.executable, "-P", "-m", "pytest_nsbox.launcher.sweep", self._cache],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_TEARDOWN,
            )

    def _said(self) -> str:
        self._words.seek(0)
        return str(self._words.read().decode(errors="replace")).strip()

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def reap(self, most: int = 0) -> None:
        """Wait for the end of killed children of this process, until `most` are left that have
        not ended by themselves: a large process takes its time."""
        for child in list(self.unreaped):
            if len(self.unreaped) > most or wire.is_ready(child.pidfd, 0):
                self.unreaped.remove(child)
                child.kill()

    def request(
        self, operation: str, fds: Sequence[int] = (), **fields: Any
    ) -> tuple[wire.Message, list[int]]:
        """Ask the launcher. Raises the NsboxError that it answers with."""
        self.start()
        assert self._lifeline is not None
        try:
            return wire.request(self._lifeline, {"op": operation, **fields}, fds)
        except ContainerDied as error:
            words = self._said()
            if str(error).endswith(wire.ENDED):
                self._sweep_after_kill()
            if words and operation not in ("destroy",):
                raise ContainerDied(f"the launcher has ended:\n{words}") from None
            raise

    def destroy_later(self, container: Container) -> None:
        """Have one taken down that nobody waits for."""
        self.start()
        assert self._lifeline is not None
        message = {"op": "destroy", "id": container.id, "later": True}
        try:
            answer = wire.post(self._lifeline, message)
        except ContainerDied:
            self._sweep_after_kill()
            raise
        self._unheard.append((container, os.getpid(), answer))

    def hear(self) -> None:
        """How those have ended that were left to. The launcher answers in the order that it is
        asked in, so after any of its answers this does not wait."""
        while True:
            try:
                unheard = container, pid, answer = self._unheard.pop(0)
            except IndexError:  # another thread may do the same
                return
            try:
                if os.getpid() == pid:  # or it would be heard in a fork, and not here
                    container.note_end(wire.reply_of(answer)[0])
            except NsboxError as error:
                self._late.append(error)
            except BaseException:  # an interrupt
                self._unheard.insert(0, unheard)
                raise
            answer.close()

    def replies(self, operation: str, **fields: Any) -> Iterator[wire.Message]:
        """Ask the launcher for what comes in several messages."""
        self.start()
        assert self._lifeline is not None
        with wire.ask(self._lifeline, {"op": operation, **fields}) as answer:
            more = True
            while more:
                message, _ = wire.reply_of(answer)
                more = bool(message.get("more"))
                yield message

    # ------------------------------------------------------------------ things

    def container(
        self,
        name: str | None = None,
        *,
        spec: SandboxSpec | None = None,
        passthrough: Sequence[str] = (),
        visible: Sequence[str] = (),
        body: Sequence[str] | None = None,
        **keywords: Any,
    ) -> Container:
        """A running container; a context manager that takes it down.

        `name` is its host name too, unless `hostname` is given. `spec` replaces the session's
        defaults, `keywords` are those of `@pytest.mark.sandbox`. `passthrough` are directories of
        the host to show as they are, writable; `visible` those to show copy-on-write even below
        /tmp or /run, which a container has for itself. `body` says that a fork of this process
        will enter it: on an image, this Python is shown there too, and the paths that `body` names.

        Raises SpecError, RootfsError, UnsupportedError or SetupError.
        """
        full = (spec or self.spec).replace(**keywords)
        rootfs = self.resolve_rootfs(full.rootfs)
        brought = None if body is None else self.python_on(rootfs, body)
        entered = body is not None
        return self._create(full, name, rootfs, passthrough, visible, brought, entered=entered)

    def _create(
        self,
        spec: SandboxSpec,
        name: str | None,
        rootfs: Rootfs,
        passthrough: Sequence[str],
        visible: Sequence[str],
        brought: Brought | None,
        *,
        entered: bool = False,
        trial: bool = False,
    ) -> Container:
        name = self._name(name)
        visible = [*map(os.path.realpath, visible), *_own_places()]
        used = [*self._used]
        try:
            order = make_order(spec, name, rootfs, passthrough, visible, brought, trial=trial)
            reply, fds = self.request("create", order=order.to_wire(), used=used, enter=entered)
            self._used.difference_update(used)
        except BaseException:
            self._names.discard(name)
            raise
        container = Container(self, spec, order, rootfs, brought, reply, fds)
        self._living[name] = container
        self.hear()
        return container

    def use(self, id: int) -> None:
        """Something is about to run in a container, so it will have to know its neighbours. While
        there are none that can wait until there is one."""
        self._used.add(id)  # first, since another thread may be making one
        if len(self._names) > 1 or os.getpid() != self._owner:
            with contextlib.suppress(NsboxError):  # it is dead, and will be said to be
                self.request("use", id=id)

    def python_on(self, rootfs: Rootfs, more: Sequence[str]) -> Brought | None:
        """What this Python, and the paths `more` with it, takes to be shown on an image; tried
        when first asked for. Raises UnsupportedError where it does not start."""
        if rootfs.is_host:
            return None
        key = (*rootfs.stack, "", *more)
        if key not in self._pythons:
            try:
                self._pythons[key] = self._bring(rootfs, more)
            except UnsupportedError as error:
                self._pythons[key] = str(error)
        found = self._pythons[key]
        if isinstance(found, str):
            raise UnsupportedError(found)
        return found

    def _bring(self, rootfs: Rootfs, more: Sequence[str]) -> Brought:
        from pytest_nsbox.rootfs import LayerCache
        from pytest_nsbox.session import python

        if self._layers is None:
            self._layers = LayerCache(Path(self._cache))
        brought = python.bring(rootfs, more, self._layers)
        spec = SandboxSpec(network="none")
        with self._create(spec, None, rootfs, (), (), brought, trial=True) as container:
            python.must_start(container)
        return brought

    def try_out(self, spec: SandboxSpec) -> None:
        """Make one and take it down. Raises what `container` does."""
        self._create(spec, None, self.resolve_rootfs(spec.rootfs), (), (), None, trial=True).close()

    def _name(self, name: str | None) -> str:
        if name is None:
            number = 1
            while f"nsbox{number}" in self._names:
                number += 1
            name = f"nsbox{number}"
        else:
            try:
                SandboxSpec.make(hostname=name)
            except SpecError:
                raise SpecError(
                    f"container name {name!r}: letters, digits and hyphens, as it is a host name"
                ) from None
            if name in self._names:
                raise SpecError(f"container name {name!r} is taken by one that still runs")
        self._names.add(name)
        return name

    def release_name(self, name: str) -> None:
        self._names.discard(name)
        self._living.pop(name, None)

    def memory_limits(self) -> list[int]:
        """Those of the containers there are now, in bytes."""
        limits = [container.spec.memory for container in self._living.values()]
        return [limit for limit in limits if limit is not None]

    def network(
        self, name: str | None = None, *, subnet: str | None = None, internet: bool = True
    ) -> Network:
        """A network of its own; a context manager that removes it.

        `subnet` is an IPv4 network (default: 10.89.N.0/24). Without `internet` it has no way out.
        """
        return Network.make(self, name, subnet, internet)

    def network_number(self) -> int:
        """A number for a network that has not been named."""
        self._networks += 1
        return self._networks % 256

    def resolve_rootfs(self, source: Any) -> Rootfs:
        """Where a container's files come from. Raises RootfsError."""
        if isinstance(source, Rootfs):
            for directories in source.frozen.values():
                if not all(map(os.path.isdir, directories)):
                    raise RootfsError(
                        f"the {source.source} is gone: it lives as long as the session it was "
                        "taken in"
                    )
            return source
        source = os.fspath(source)
        if source == "host":
            return Rootfs(source="host", layers=())
        if self._resolve_rootfs is not None:
            found = self._resolve_rootfs(source)
            if found is not None:
                return found
        if _is_path(source):
            source = os.path.abspath(source)
        reply, _ = self.request("import_rootfs", source=source)
        return Rootfs.from_wire(reply["rootfs"])

    def describe(self) -> str:
        """One line on what this host gives, and what it lacks."""
        return str(self.request("describe")[0]["host"])


def _ends(pid: int, timeout: float) -> bool:
    """Whether a child ends in time; Popen.wait would look every 50 ms."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:  # it has been reaped, SIGCHLD being ignored here
        return True
    try:
        return wire.is_ready(pidfd, timeout)
    finally:
        os.close(pidfd)


def _is_path(source: str) -> bool:
    return os.path.exists(source.partition("#")[0]) or ":" not in source


@functools.cache
def _own_places() -> tuple[str, ...]:
    """Where this Python is, which every container shows."""
    return (os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix))


def _cache_directory() -> str:
    """$XDG_CACHE_HOME/nsbox, or ~/.cache/nsbox."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return str(Path(home, "nsbox").absolute())


def check_host() -> None:
    """Raises UnsupportedError where no container can be made at all."""
    if sys.platform != "linux":
        raise UnsupportedError(not_linux(sys.platform))
    with contextlib.suppress(OSError):
        if "\toverlay" not in Path("/proc/filesystems").read_text() and not _load_overlay():
            raise UnsupportedError(
                "this kernel has no overlay filesystem; load its module: modprobe overlay"
            )


def _load_overlay() -> bool:
    """The module loads by itself at the first mount, where there is a module."""
    release = os.uname().release
    return any(Path(f"/lib/modules/{release}/kernel/fs/overlayfs").glob("overlay.ko*"))
