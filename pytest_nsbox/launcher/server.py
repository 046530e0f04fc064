"""The launcher's loop: requests from the test process, and what happens to containers."""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
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
from pytest_nsbox.kernel import cgroup, libc, processes
from pytest_nsbox.launcher import ledger, names
from pytest_nsbox.launcher.audit import left_by_this
from pytest_nsbox.launcher.build import (
    UNTIL_DEAD,
    Container,
    Workshop,
    begin,
    finish,
    known_names,
    make_cgroup,
)
from pytest_nsbox.launcher.changes import Own, read_changes, write_upper
from pytest_nsbox.launcher.copying import copy_between
from pytest_nsbox.launcher.hub import Bridge, Hub, Interface, make_socket
from pytest_nsbox.launcher.janitor import Janitor
from pytest_nsbox.launcher.pool import Pool
from pytest_nsbox.launcher.ports import HostPorts, forward_port
from pytest_nsbox.launcher.snapshot import take_snapshot
from pytest_nsbox.launcher.standing import Standing
from pytest_nsbox.launcher.undo import Undo
from pytest_nsbox.launcher.uplink import Host
from pytest_nsbox.launcher.wayout import WayOut
from pytest_nsbox.launcher.worker import Work, stop
from pytest_nsbox.launcher.zygote import Zygote
from pytest_nsbox.model.addressing import Subnet
from pytest_nsbox.model.limits import Limits
from pytest_nsbox.model.order import Order
from pytest_nsbox.wire import Message

_MOST_DYING = 8
_BREATH = 0.003  # seconds in which a test begins to use what it has got, and is not disturbed
Reply = tuple[Message, list[int]]
Answer = Reply | Work  # a child's work answers for itself


class Launcher:
    """Owns everything that a session has made, and takes all of it down at the end."""

    def __init__(self, lifeline: socket.socket, parent: int, options: Message) -> None:
        self.lifeline = lifeline
        self.options = options
        self.undo = Undo()
        self.containers: dict[int, Container] = {}
        self.dying: dict[int, Container] = {}  # killed, with nobody waiting for their end
        self.late: list[NsboxError] = []  # what went wrong with these
        self.bridges: dict[int, Bridge] = {}
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
        self._hubs: dict[bool, Hub] = {}
        self._defaults: dict[bool, Bridge] = {}

    def open(self, standing: Standing, zygote: Zygote, janitor: Janitor) -> None:
        """Leave the host's network namespace for the hub; find the cgroups; sweep."""
        state, cache = ledger.state_directory(), Path(self.options["cache"])
        ledger.sweep(state)
        self.standing = standing
        if standing.envoy is not None:
            self.undo.push("end the envoy", standing.envoy.close)
        self.ledger = ledger.Ledger(state)
        self.undo.push("close the ledger", self.ledger.close)
        self.undo.push("remove layers that the janitor has not", self.ledger.remove_layers)
        self.undo.push("wait for the janitor", janitor.close)
        self.undo.push("remove the cover", self._remove_cover)
        self.undo.push("end the zygote", zygote.close)
        self.layer_cache = rootfs.LayerCache(cache / standing.cache_name)
        self.host = Host()
        self.host_ports = HostPorts(zygote)
        self.workshop = Workshop(
            None, self.ledger, cache / "writable", zygote, janitor, rootless=standing.rootless
        )
        try:
            driver = cgroup.detect(self.ledger.name)
            self.workshop.cgroups = driver
            # the containers' own are below these
            for path in driver.session_paths():
                self.ledger.record(ledger.CGROUP, path)
            self.undo.push("rmdir session cgroup", driver.close)
        except UnsupportedError as error:
            why = self.options["no_scope"]
            self.workshop.no_cgroups = str(error) + (f" ({why})" if why else "")
        self._hub(True)
        self.way_out = WayOut(self.host, standing, self.ledger, self.options["uplink"])
        self.undo.push("close the way out", self.way_out.close)
        self.pool = Pool(int(self.options["pool"]), self._begin)

    def _begin(self, order: Order) -> Container:
        self.last_id += 1
        return begin(self.last_id, order, self.workshop)

    def _remove_cover(self) -> None:
        if self.workshop.cover is not None:
            self.workshop.janitor.remove(self.workshop.cover, self.ledger.path)

    def _hub(self, internet: bool) -> Hub:
        if internet not in self._hubs:
            hub = Hub(internet=internet)
            self._hubs[internet] = hub
            self.undo.push("close hub", hub.close)
            if internet:
                self.host.home = hub.netns
            else:
                libc.setns(self._hubs[True].netns, libc.CLONE_NEWNET)  # where the launcher lives
        return self._hubs[internet]

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
            self.workshop.zygote.fork_ahead()

    def close(self) -> None:
        """Take everything down. Raises the first error, the others in its notes."""
        errors: list[NsboxError] = []
        for worker in list(self.workers.items()):
            stop(*worker)
        try:
            self.pool.drop()
        except NsboxError as error:
            errors.append(error)
        for container in list(self.dying.values()):
            self._bury(container)
        errors += self.late
        until = time.monotonic() + UNTIL_DEAD
        for container in list(self.containers.values()):
            container.kill("stopped")
            container.until = until  # together, not one after the other
        for id in list(self.containers):
            try:
                self._destroy(id)
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
                reply = {"error": wire.dump_error(SetupError(f"{message['op']}: {error!r}"))}
            finally:
                wire.close_all(fds)
            try:
                wire.send(answer, reply, out)
            except OSError:
                # who asked was interrupted; nobody would ever take down what it does not know of
                if message.get("op") == "create" and "id" in reply:
                    self.destroy(reply, [])
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

    # ------------------------------------------------------------------ requests

    def create(self, message: Message, fds: list[int]) -> Reply:
        """Build a container."""
        order = Order.from_wire(message["order"])
        container = self._build(order)
        self.containers[container.id] = container
        self.pool.given(container)
        self.created = time.monotonic()
        try:
            self._attend(container, order)
            pidfd = os.dup(container.pidfd)
        except BaseException as error:
            container.kill("stopped")
            self._forget(container)
            container.undo.run_after(error)
            raise
        reply: Message = {
            "id": container.id,
            "pid": container.pid,
            "addresses": [[i.ip, i.ip6, i.bridge.id] for i in container.interfaces],
        }
        assert container.line is not None
        return reply, [container.line.detach(), pidfd]

    def _build(self, order: Order) -> Container:
        bridges = self._bridges_of(order)
        joiners = [self._joiner(bridge, order) for bridge in bridges]
        container = self.pool.take(order)
        if container is not None:
            with contextlib.suppress(NsboxError):  # a new one is built, or fails and says why
                finish(container, order, joiners)
                return container
        container = self._begin(order)
        finish(container, order, joiners)
        return container

    def _attend(self, container: Container, order: Order) -> None:
        """Notice its end, its time and its want of memory; make it known to its neighbours."""
        self.selector.register(container.pidfd, selectors.EVENT_READ, lambda: self._died(container))
        if container.cgroup is not None and order.limits.memory is not None:
            self._watch_memory(container)
        if order.timeout is not None:
            heapq.heappush(self.timers, (time.monotonic() + order.timeout, container.id))
        self._tell_neighbours(container)

    def _bridges_of(self, order: Order) -> list[Bridge]:
        if order.networks:
            return [self.bridges[id] for id in order.networks]
        if order.network not in ("nat", "isolated"):
            return []
        internet = order.network == "nat"
        if internet not in self._defaults:
            subnet = Subnet(self.options["subnet"])
            self._defaults[internet] = self._new_bridge("default", subnet, internet)
        return [self._defaults[internet]]

    def _new_bridge(self, name: str, subnet: Subnet, internet: bool) -> Bridge:
        hub = self._hub(internet)
        if internet:
            self.way_out.open(hub)
        mtu = self.host.mtu()
        bridge = Bridge.make(len(self.bridges) + 1, name, hub, subnet, mtu)
        self.bridges[bridge.id] = bridge
        return bridge

    @staticmethod
    def _joiner(bridge: Bridge, order: Order) -> Callable[[], Interface]:
        return lambda: bridge.join(order.name)

    def _watch_memory(self, container: Container) -> None:
        assert container.cgroup is not None
        fd = container.cgroup.oom_event_fd()
        if fd is None:
            return
        self.selector.register(fd, selectors.EVENT_READ, lambda: self._out_of_memory(container))
        container.undo.push("stop watching memory", lambda: self._unwatch(fd))

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self.selector.unregister(fd)
        os.close(fd)

    def _out_of_memory(self, container: Container) -> None:
        """Kill all of a container in which the kernel has killed a process for its memory."""
        limited = container.order.limits.memory is not None
        if limited and container.cgroup is not None and container.cgroup.oom_kills():
            container.kill("memory")

    def _died(self, container: Container) -> None:
        self.selector.unregister(container.pidfd)
        self._out_of_memory(container)
        container.reap()
        if container.id in self.dying:
            self._bury(container)

    def _tell_neighbours(self, container: Container) -> None:
        """A new name on a network is known to those who were there before."""
        shared = {interface.bridge.id for interface in container.interfaces}
        for other in self.containers.values():
            if other is container or not other.alive or other.init is None:
                continue
            if shared & {interface.bridge.id for interface in other.interfaces}:
                self._write_hosts(other)

    @staticmethod
    def _write_hosts(container: Container) -> None:
        assert container.init is not None
        text = names.hosts(known_names(container), container.order.hosts)
        container.own_files[names.HOSTS] = text
        if container.order.read_only:  # for its init, too
            write_upper(container.places, container.scratch, names.HOSTS, text)
            return
        mine, theirs = wire.pair()
        with mine, theirs, contextlib.suppress(OSError):
            # one that is paused does not read: nobody else is to wait for it
            container.init.setblocking(False)
            wire.send(container.init, {"op": "hosts", "text": text}, [theirs.fileno()])

    def destroy(self, message: Message, fds: list[int]) -> Reply:
        """Kill a container and remove all that was its."""
        container = self.containers.get(message["id"])
        if container is None:
            return {}, []
        self._out_of_memory(container)  # which may not have been noticed yet
        container.kill("stopped")
        if message.get("later"):
            self._leave_to_die(container)
        else:
            self._destroy(container.id)
        return container.state(), []

    def _leave_to_die(self, container: Container) -> None:
        """Go on while the kernel takes it down; the addresses are free for the next one. So few
        are left like this that what they still hold stays small."""
        for interface in container.interfaces:
            interface.leave()
        self.dying[container.id] = self.containers.pop(container.id)
        container.until = time.monotonic() + UNTIL_DEAD
        if not container.alive:
            self._bury(container)
        while len(self.dying) > _MOST_DYING:
            self._bury(next(iter(self.dying.values())))

    def _bury(self, container: Container) -> None:
        self.containers[container.id] = self.dying.pop(container.id)
        try:
            self._destroy(container.id)
        except NsboxError as error:
            self.late.append(error)

    def _destroy(self, id: int) -> None:
        container = self.containers[id]
        self._forget(container)
        container.undo.run()

    def _forget(self, container: Container) -> None:
        del self.containers[container.id]
        self.pool.gone(container)
        with contextlib.suppress(KeyError):
            self.selector.unregister(container.pidfd)

    def state(self, message: Message, fds: list[int]) -> Reply:
        """Whether a container lives, why not, and what it has used."""
        container = self._get(message)
        self._out_of_memory(container)
        if container.reason or container.has_ended():
            container.reap()
        return {**container.state(), **_running(message, container)}, []

    def _get(self, message: Message) -> Container:
        container = self.containers.get(message["id"])
        if container is None:
            raise ContainerDied("the container has been taken down")
        return container

    def changes(self, message: Message, fds: list[int]) -> Work:
        """What a container, alive or dead, has changed against its root filesystem."""
        container = self._get(message)
        files, scratch = container.own_files, container.scratch
        return Work(
            lambda: read_changes(container.places, scratch, container.order, files), [scratch]
        )

    def snapshot(self, message: Message, fds: list[int]) -> Work:
        """Freeze what a container, alive or dead, has written."""
        container = self._get(message)
        self.snapshots += 1
        directory = self.workshop.layers / f"{self.ledger.name}-snapshot{self.snapshots}"
        self.ledger.record(ledger.LAYER, str(directory))  # it is removed at the end by that
        directory.mkdir(mode=0o700, parents=True)
        go_on = self._hold(container)
        own = Own.of(container.order, container.places, container.own_files)
        scratch = container.scratch
        return Work(
            lambda: take_snapshot(container.places, scratch, own, str(directory), go_on),
            [scratch],
            go_on,
        )

    @staticmethod
    def _hold(container: Container) -> Callable[[], None]:
        """Have every process stand still, where that can be; returns how to let them go on."""
        group = container.cgroup
        if group is None or not container.alive:
            return lambda: None
        try:
            group.freeze()
        except UnsupportedError:
            return lambda: None

        def go_on() -> None:
            if not container.paused:
                with contextlib.suppress(OSError):  # it has been taken down
                    group.thaw()

        return go_on

    def copy(self, message: Message, fds: list[int]) -> Work:
        """Copy a file or a tree into a container or out of it."""
        self._get(message)
        there, here = fds
        return Work(lambda: copy_between(message, there, here), fds)

    def update(self, message: Message, fds: list[int]) -> Reply:
        """Change the limits of a running container."""
        container = self._get(message)
        if container.cgroup is None:
            raise UnsupportedError(f"no limits can be kept: {self.workshop.no_cgroups}")
        try:
            container.cgroup.update(Limits(**message["limits"]))
        except OSError as error:
            raise SetupError(f"update limits: {error}") from error
        return {}, []

    def freeze(self, message: Message, fds: list[int]) -> Reply:
        """Stop every process of a container where it is, or let them go on."""
        container = self._get(message)
        if container.cgroup is None:
            raise UnsupportedError(f"cannot pause: {self.workshop.no_cgroups}")
        container.paused = bool(message["frozen"])
        if container.paused:
            container.cgroup.freeze()
        else:
            container.cgroup.thaw()
        return {}, []

    def kill(self, message: Message, fds: list[int]) -> Reply:
        """Kill a container; what it leaves stays to be looked at until it is destroyed."""
        container = self._get(message)
        running = _running(message, container)
        container.kill(message.get("reason", "killed"))
        container.reap()
        return {**container.state(), **running}, []

    def enter(self, message: Message, fds: list[int]) -> Reply:
        """What a process of the test's own needs to become one of the container's."""
        container = self._get(message)
        if not container.alive:
            raise ContainerDied("the container has ended")
        out = [os.dup(container.pidfd)]
        if container.cgroup is not None:
            for path in container.cgroup.procs_files():
                out.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        order = container.order
        reply: Message = {
            "network": order.own_network,
            "time": order.uptime is not None,
            "user": order.userns or self.standing.rootless,
            "rootless": self.standing.rootless,
            "capabilities": None if order.privileged else list(order.capabilities),
        }
        return reply, out

    def network(self, message: Message, fds: list[int]) -> Reply:
        """Make a network."""
        bridge = self._new_bridge(message["name"], Subnet(message["subnet"]), message["internet"])
        return {"id": bridge.id, "gateway": bridge.subnet.gateway}, []

    def remove_network(self, message: Message, fds: list[int]) -> Reply:
        bridge = self.bridges.pop(message["id"], None)
        if bridge is not None:
            bridge.remove()
        return {}, []

    def socket(self, message: Message, fds: list[int]) -> Reply:
        """A socket as of a host next door, on the container's first network."""
        container = self._get(message)
        if not container.interfaces:
            return {"ip": None}, []
        interface = container.interfaces[0]
        sock = make_socket(
            interface.bridge.hub, self._hub(True).netns, socket.AF_INET, message["type"]
        )
        return {"ip": interface.ip}, [sock.detach()]

    def publish(self, message: Message, fds: list[int]) -> Reply:
        """Forward what connects to a listening socket of the host to a port of a container."""
        container = self._get(message)
        pid = forward_port(container, fds[0], int(message["port"]), self._hub(True).netns)
        return {"pid": pid}, []

    def expose_host(self, message: Message, fds: list[int]) -> Reply:
        """Make a port of the host's loopback reachable from a container."""
        container = self._get(message)
        if not container.alive:
            raise ContainerDied("the container has ended")
        try:
            found = self.host_ports.expose(container, message["port"], self._hub(True).netns)
        except OSError as error:
            return wire.dump_oserror(error), []
        self._write_hosts(container)
        return {"address": found}, []

    def import_rootfs(self, message: Message, fds: list[int]) -> Reply:
        """Unpack a root filesystem into the cache, unless it is there already."""
        found = rootfs.resolve(str(message["source"]), self.layer_cache)
        return {"rootfs": found.to_wire()}, []

    def try_limits(self, message: Message, fds: list[int]) -> Reply:
        """Whether limits can be kept, by a cgroup with nobody in it."""
        group = make_cgroup("trial", Limits(**message["limits"]), self.workshop)
        if group is not None:
            group.remove()
        return {}, []

    def open_way_out(self, message: Message, fds: list[int]) -> Reply:
        """Before a container needs it, so that it can be said whether there is one."""
        self.way_out.open(self._hub(True))
        return {}, []

    def describe(self, message: Message, fds: list[int]) -> Reply:
        """What was found on this host, for the report header."""
        driver = self.workshop.cgroups
        cgroups = driver.describe() if driver else f"no limits: {self.workshop.no_cgroups}"
        found = [self.standing.describe(), cgroups, self.way_out.describe()]
        return {"host": "; ".join(filter(None, found))}, []


def _running(message: Message, container: Container) -> Message:
    """Who runs in a container, if the request wants to be told."""
    if not message.get("tell") or not container.alive:
        return {}
    return {"running": [f"{pid} ({name})" for pid, name in processes.below_init(container.pid)]}


OPERATIONS: dict[str, Callable[[Launcher, Message, list[int]], Answer]] = {
    name: getattr(Launcher, name)
    for name in (
        "changes",
        "copy",
        "create",
        "describe",
        "destroy",
        "enter",
        "expose_host",
        "freeze",
        "import_rootfs",
        "kill",
        "network",
        "open_way_out",
        "publish",
        "remove_network",
        "snapshot",
        "socket",
        "state",
        "try_limits",
        "update",
    )
}


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
    launcher = Launcher(socket.socket(fileno=lifeline_fd), parent, options)
    signal.signal(signal.SIGTERM, lambda *_: launcher.lifeline.shutdown(socket.SHUT_RD))
    if isinstance(standing, UnsupportedError):
        return _refuse(launcher, standing)
    try:
        launcher.open(standing, zygote, janitor)
    except (NsboxError, OSError) as error:
        return _refuse(launcher, error)
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
