"""The launcher's loop: requests from the test process, and what happens to containers."""

from __future__ import annotations

import contextlib
import errno
import gc
import heapq
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pytest_nsbox import rootfs, wire
from pytest_nsbox.errors import (
    ContainerDied,
    NsboxError,
    SetupError,
    TeardownError,
    UnsupportedError,
)
from pytest_nsbox.kernel import cgroup, mounts, userns
from pytest_nsbox.kernel.namespaces import Home
from pytest_nsbox.launcher import ledger
from pytest_nsbox.launcher.audit import left_by_this
from pytest_nsbox.launcher.build import Workshop, begin, finish
from pytest_nsbox.launcher.container import Container
from pytest_nsbox.launcher.envoy import run_to_its_end
from pytest_nsbox.launcher.footing import Footing
from pytest_nsbox.launcher.janitor import Janitor
from pytest_nsbox.launcher.neighbours import Neighbours
from pytest_nsbox.launcher.networks import Networks
from pytest_nsbox.launcher.operations import OPERATIONS
from pytest_nsbox.launcher.pool import Kind, Pool
from pytest_nsbox.launcher.ports import HostPorts
from pytest_nsbox.launcher.standing import Standing
from pytest_nsbox.launcher.undo import Undo
from pytest_nsbox.launcher.uplink import Host
from pytest_nsbox.launcher.wayout import WayOut
from pytest_nsbox.launcher.wiring import Joiner
from pytest_nsbox.launcher.worker import Work, stop
from pytest_nsbox.launcher.zygote import Zygote
from pytest_nsbox.model.order import Order
from pytest_nsbox.wire import Message

_MOST_DYING = 8
_BREATH = 0.003  # seconds in which a test begins to use what it has got, and is not disturbed


class Launcher:
    """Owns everything that a session has made, and takes all of it down at the end."""

    def __init__(self, lifeline: socket.socket, parent: int, options: Message) -> None:
        self.lifeline = lifeline
        self.options = options
        self.undo = Undo()
        self.containers: dict[int, Container] = {}
        self.neighbours = Neighbours()
        self.dying: dict[int, Container] = {}  # killed, with nobody waiting for their end
        self.late: list[NsboxError] = []  # what went wrong with these, and with those of the pool
        self.timers: list[tuple[float, int]] = []  # a heap: when, which container
        self.last_id = 0
        self.created = 0.0  # when the last container was, on the monotonic clock
        self.selector = selectors.DefaultSelector()
        self.selector.register(lifeline, selectors.EVENT_READ, self._request)
        self.parent = os.pidfd_open(parent)
        self.selector.register(self.parent, selectors.EVENT_READ, self._end)
        self.ending = False
        self.snapshots = 0
        self.workers: dict[int, int] = {}  # pid: pidfd

    def open(self, standing: Standing, zygote: Zygote, janitor: Janitor) -> None:
        """Leave the host's network namespace for the hub; find the cgroups; sweep."""
        state, cache = ledger.state_directory(), Path(self.options["cache"])
        ledger.sweep_all(state, cache)
        self.standing = standing
        if standing.envoy is not None:
            self.undo.push("end the envoy", standing.envoy.close)
        self.ledger = ledger.Ledger(state, ledger.layers_directory(cache))
        self.undo.push("close the ledger", self.ledger.close)
        self.undo.push("remove layers that the janitor has not", self.ledger.remove_layers)
        self.undo.push("wait for the janitor", janitor.close)
        self.undo.push("remove the cover", self._remove_cover)
        self.undo.push("end the zygote", zygote.close)
        self.layer_cache = rootfs.LayerCache(cache / standing.cache_name)
        self.host = Host()
        self.host_ports = HostPorts(zygote)
        self.networks = Networks(self.host, self.undo, self.options["subnet"])
        footing = Footing(self.ledger, cache / "writable", janitor)
        self.workshop = Workshop(
            footing,
            self.ledger,
            zygote,
            janitor,
            Home(("mnt", "ipc", "uts", "net")),
            in_userns=not userns.is_first(),
            may_pivot=mounts.may_pivot(),
        )
        self.selector.register(zygote.watch, selectors.EVENT_READ, self._lay_foundation)
        try:
            driver = cgroup.detect(self.ledger.name)
            footing.cgroups = driver
            # the containers' own are below these
            for path in driver.session_paths():
                self.ledger.record(ledger.CGROUP, path)
            self.undo.push("rmdir session cgroup", driver.close)
        except UnsupportedError as error:
            why = self.options["no_scope"]
            footing.no_cgroups = str(error) + (f" ({why})" if why else "")
        self.undo.push("remove what was made ahead", footing.drop)
        self.way_out = WayOut(self.host, standing, self.ledger, self.options["uplink"])
        self.networks.way_out = self.way_out
        self.undo.push("close the way out", self.way_out.close)
        self.pool = Pool(int(self.options["pool"]), self._begin, self._discard)

    def _begin(self, order: Order, joiners: Sequence[Joiner] | None = None) -> Container:
        self.last_id += 1
        return begin(self.last_id, order, self.workshop, joiners)

    def run_outside(self, *command: str) -> str:
        """`run_to_its_end` as whose the session is, in the host's network."""
        if self.standing.envoy is not None:
            return self.standing.envoy.run(*command)
        with self.host.entered():
            return run_to_its_end(*command)

    def _remove_cover(self) -> None:
        if self.workshop.cover is not None:
            self.workshop.footing.remove_layer(self.workshop.cover)

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Work until the test process is gone or says that it is done."""
        while not self.ending:
            due = [when for when, _ in self.timers[:1]]
            if (ahead := self._ahead_due()) is not None:
                due.append(ahead)
            timeout = max(min(due) - time.monotonic(), 0) if due else None
            events = self.selector.select(timeout)
            if not events and ahead is not None and ahead <= time.monotonic():
                self._work_ahead()
            for key, _ in events:
                # what was done about one may have ended the interest in the next
                if self.selector.get_map().get(key.fileobj) is key:
                    key.data()
            self._expire()

    def _ahead_due(self) -> float | None:
        """When to do something that will be wanted soon; None while nothing is."""
        kind = self.pool.wants()
        if kind is not None and not kind.ready:
            return 0.0  # the next test would have to wait
        if kind is not None or self.workshop.zygote.may_fork_ahead():
            return self.created + (_BREATH if self.pool.size else 0)
        return None

    def _work_ahead(self) -> None:
        if self.pool.wants() is not None:
            self.pool.fill()
        else:
            self.workshop.zygote.fork_ahead(visited=self.workshop.may_pivot)

    def _lay_foundation(self) -> None:
        if not wire.is_ready(self.lifeline.fileno(), 0):  # who waits comes first
            shop = self.workshop
            shop.zygote.lay_foundation(shop.planner.latest, shop.home)

    def close(self) -> None:
        """Take everything down. Raises the first error, the others in its notes."""
        errors: list[NsboxError] = []
        for worker in list(self.workers.items()):
            stop(*worker)
        self.pool.drop()
        for container in list(self.dying.values()):
            self._bury_late(container)
        errors += self.late
        for container in list(self.containers.values()):
            container.kill("stopped")  # together, not one after the other
        for container in list(self.containers.values()):
            try:
                self._bury(container)
            except NsboxError as error:
                errors.append(error)
        try:
            self.undo.run()
        except NsboxError as error:
            errors.append(error)
        if left := left_by_this(Path(self.options["cache"])):
            errors.append(TeardownError(f"left behind: {', '.join(left)}"))
        if errors:
            for later in errors[1:]:
                errors[0].add_note(f"then {later}")
            raise errors[0]

    def _end(self) -> None:
        self.ending = True

    def _request(self) -> None:
        try:
            received = wire.receive(self.lifeline)
        except (ValueError, OSError):
            received = None
        if received is None:
            self.ending = True
            return
        message, fds = received
        with socket.socket(fileno=fds.pop(0)) as answer:
            reply: Message = {}
            out: list[int] = []
            try:
                found = OPERATIONS[message["op"]](self, message, fds)
                if isinstance(found, Work):
                    self._start(found, answer)
                    return
                reply, out = found
            except NsboxError as error:
                reply = {"error": wire.dump_error(error)}
            except Exception as error:
                text = str(error) if isinstance(error, OSError) else repr(error)
                reply = {"error": wire.dump_error(SetupError(f"{message['op']}: {text}"))}
            finally:
                wire.close_all(fds)
            try:
                wire.send(answer, reply, out)
            except OSError:
                # who asked was interrupted; nobody would ever take down what it does not know of
                if message.get("op") == "create" and "id" in reply:
                    self.destroy(self.get(reply))
            finally:
                wire.close_all(out)

    def _start(self, work: Work, answer: socket.socket) -> None:
        pid, pidfd = work.start(answer)
        self.workers[pid] = pidfd

        def ended() -> None:
            self.selector.unregister(pidfd)
            del self.workers[pid]
            stop(pid, pidfd)
            if work.done is not None:
                work.done()

        self.selector.register(pidfd, selectors.EVENT_READ, ended)

    def _expire(self) -> None:
        while self.timers and self.timers[0][0] <= time.monotonic():
            _, id = heapq.heappop(self.timers)
            if id in self.containers:
                self.containers[id].kill("timeout")

    # ------------------------------------------------------------------ containers

    def create(self, order: Order) -> tuple[Container, int]:
        """A container, and a descriptor of its PID 1 to give away."""
        kind = self.pool.kind_of(order)
        container = self._build(order, kind)
        self.containers[container.id] = container
        self.pool.given(container, kind)
        self.created = time.monotonic()
        try:
            self._attend(container, order)
            return container, os.dup(container.pidfd)
        except BaseException as error:
            container.kill("stopped")
            self._forget(container)
            container.undo.run_after(error)
            raise

    def _build(self, order: Order, kind: Kind | None) -> Container:
        joiners = self.networks.joiners(order)
        container = self.pool.take(kind)
        if container is not None:
            try:
                self._finish(container, order, joiners)
                return container
            except NsboxError as error:  # a new one is built, or fails and says why
                if getattr(error, "__notes__", ()):  # it could not be undone
                    self.late.append(error)
        built = self._begin(order, joiners)
        self._finish(built, order, joiners)
        return built

    def _finish(self, container: Container, order: Order, joiners: Iterable[Joiner]) -> None:
        home = self.workshop.home
        finish(container, order, joiners, home, lambda: self._introduce(container))

    def _introduce(self, container: Container) -> None:
        self.neighbours.tell(container)

    def _attend(self, container: Container, order: Order) -> None:
        """Notice its end, its time and its want of memory."""
        self.selector.register(container.pidfd, selectors.EVENT_READ, lambda: self._died(container))
        if container.cgroup is not None and order.limits.memory is not None:
            self._watch_memory(container)
        if order.timeout is not None:
            heapq.heappush(self.timers, (time.monotonic() + order.timeout, container.id))

    def _watch_memory(self, container: Container) -> None:
        assert container.cgroup is not None
        fd = container.cgroup.oom_event_fd()
        if fd is None:
            return
        self.selector.register(fd, selectors.EVENT_READ, lambda: self.notice_memory(container))
        container.undo.push("stop watching memory", lambda: self._unwatch(fd))

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self.selector.unregister(fd)
        os.close(fd)

    def notice_memory(self, container: Container) -> None:
        """Kill all of a container in which the kernel has killed a process for its memory."""
        if container.cgroup is None or container.order.limits.memory is None:
            return
        with contextlib.suppress(OSError):  # then nobody knows why, but it has to end all the same
            if container.cgroup.oom_kills():
                container.kill("memory")

    def _died(self, container: Container) -> None:
        self.selector.unregister(container.pidfd)
        self.notice_memory(container)
        container.reap()
        if container.id in self.dying:
            self._bury_late(container)

    def destroy(self, container: Container, *, later: bool = False) -> None:
        """Kill a container and remove all that was its; `later` is for who has no time to wait
        for the kernel."""
        self.notice_memory(container)
        container.kill("stopped")
        if later:
            self._leave_to_die(container)
            return
        try:
            if container.alive and not self.pool.size:  # a pool makes whole ones
                self.workshop.footing.make_ahead(self.last_id + 1)  # while it dies
        finally:
            self._bury(container)

    def _leave_to_die(self, container: Container) -> None:
        """Go on while the kernel takes it down; the addresses are free for the next one. So few
        are left like this that what they still hold stays small."""
        for interface in container.interfaces:
            interface.leave()
        self.dying[container.id] = self.containers.pop(container.id)
        if not container.alive:
            self._bury_late(container)
        while len(self.dying) > _MOST_DYING:
            self._bury_late(next(iter(self.dying.values())))

    def _discard(self, container: Container) -> None:
        """Take down one that nobody has had, so that nobody is told what goes wrong until the
        end."""
        container.kill("stopped")
        try:
            container.undo.run()
        except NsboxError as error:
            self.late.append(error)

    def _bury_late(self, container: Container) -> None:
        self.containers[container.id] = self.dying.pop(container.id)
        try:
            self._bury(container)
        except NsboxError as error:
            self.late.append(error)

    def _bury(self, container: Container) -> None:
        self._forget(container)
        container.undo.run()

    def _forget(self, container: Container) -> None:
        del self.containers[container.id]
        self.pool.gone(container)
        with contextlib.suppress(KeyError):
            self.selector.unregister(container.pidfd)

    def get(self, message: Message) -> Container:
        container = self.containers.get(message["id"])
        if container is None:
            raise ContainerDied("the container has been taken down")
        return container


def main(
    lifeline_fd: int,
    parent: int,
    options: dict[str, Any],
    standing: Standing | UnsupportedError,
    zygote: Zygote,
    janitor: Janitor,
) -> int:
    """Run a launcher for the process `parent`, whose end of a socket pair is `lifeline_fd`."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # some for each container; not theirs
    launcher = Launcher(socket.socket(fileno=lifeline_fd), parent, options)
    signal.signal(signal.SIGTERM, lambda *_: launcher.lifeline.shutdown(socket.SHUT_RD))
    if isinstance(standing, UnsupportedError):
        return _refuse(launcher, standing)
    try:
        launcher.open(standing, zygote, janitor)
    except (NsboxError, OSError) as error:
        return _refuse(launcher, error)
    gc.collect()
    gc.freeze()  # or each later collection would go through all modules, again and again
    try:
        launcher.run()
    finally:
        try:
            launcher.close()
        except NsboxError as error:
            print(error, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr, flush=True)
            return 1
    return 0


def _refuse(launcher: Launcher, error: Exception) -> int:
    """Say to every request why there is no launcher, until the test process has understood."""
    if isinstance(error, OSError) and error.errno == errno.EPERM:
        error = UnsupportedError(
            f"containers cannot be made: {error.strerror}; root needs CAP_SYS_ADMIN and "
            "CAP_NET_ADMIN for it (in a container: docker run --privileged)"
        )
    elif isinstance(error, OSError):
        error = SetupError(f"the launcher cannot start: {error}")
    while True:
        try:
            received = wire.receive(launcher.lifeline)
        except (OSError, ValueError):
            received = None
        if received is None:
            launcher.undo.run()
            return 0
        _, fds = received
        with socket.socket(fileno=fds[0]) as answer, contextlib.suppress(OSError):
            wire.send(answer, {"error": wire.dump_error(error)})
        wire.close_all(fds[1:])
