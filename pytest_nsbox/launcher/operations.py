"""What the test process may ask of the launcher: each is given a message and descriptors, and
answers with the like, or with work that a child does and answers for itself."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_nsbox import rootfs, wire
from pytest_nsbox.errors import ContainerDied, SetupError, TeardownError, UnsupportedError
from pytest_nsbox.kernel import processes
from pytest_nsbox.launcher import ledger
from pytest_nsbox.launcher.changes import Own, read_changes
from pytest_nsbox.launcher.container import Container
from pytest_nsbox.launcher.copying import copy_between
from pytest_nsbox.launcher.hub import make_socket
from pytest_nsbox.launcher.neighbours import own_files, write_hosts
from pytest_nsbox.launcher.ports import forward_port
from pytest_nsbox.launcher.snapshot import take_snapshot
from pytest_nsbox.launcher.worker import Work
from pytest_nsbox.model.addressing import Subnet
from pytest_nsbox.model.limits import Limits
from pytest_nsbox.model.order import Order
from pytest_nsbox.wire import Message

if TYPE_CHECKING:
    from pytest_nsbox.launcher.server import Launcher

Reply = tuple[Message, list[int]]
Answer = Reply | Work


def create(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Build a container. `used` are those that have been used since the last one was. Who wants to
    `enter` it is given what that takes at once."""
    for id in message["used"]:
        use(launcher, {"id": id}, [])
    container, pidfd = launcher.create(Order.from_wire(message["order"]))
    reply: Message = {
        "id": container.id,
        "pid": container.pid,
        "addresses": [[i.ip, i.ip6, i.bridge.id] for i in container.interfaces],
    }
    assert container.line is not None
    out = [container.line.detach(), pidfd]
    if message["enter"]:
        try:
            reply["way_in"], more = enter(launcher, reply, [])
        except BaseException:
            wire.close_all(out)
            launcher.destroy(container)
            raise
        out += more
    return reply, out


def use(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Something is about to run in a container; one that has gone is fine."""
    container = launcher.containers.get(message["id"])
    if container is not None and container.alive:
        launcher.neighbours.use(container)
    return {}, []


def destroy(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Kill a container and remove all that was its."""
    container = launcher.containers.get(message["id"])
    if container is None:
        return {}, []
    launcher.destroy(container, later=bool(message.get("later")))
    return container.state(), []


def state(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Whether a container lives, why not, and what it has used."""
    container = launcher.get(message)
    launcher.notice_memory(container)
    if container.reason or container.has_ended():
        with contextlib.suppress(OSError):  # who does not end is said by what takes it down
            container.reap()
    return {**container.state(), **_running(message, container)}, []


def changes(launcher: Launcher, message: Message, fds: list[int]) -> Work:
    """What a container, alive or dead, has changed against its root filesystem."""
    container = launcher.get(message)
    files, scratch = own_files(container), container.scratch
    return Work(lambda: read_changes(container.places, scratch, container.order, files), [scratch])


def snapshot(launcher: Launcher, message: Message, fds: list[int]) -> Work:
    """Freeze what a container, alive or dead, has written."""
    container = launcher.get(message)
    launcher.snapshots += 1
    name = f"{launcher.ledger.name}-snapshot{launcher.snapshots}"
    directory = launcher.workshop.footing.layers / name
    launcher.ledger.record(ledger.LAYER, str(directory))  # it is removed at the end by that
    directory.mkdir(mode=0o700, parents=True)
    go_on = _hold(container)
    own = Own.of(container.order, container.places, own_files(container))
    scratch = container.scratch
    return Work(
        lambda: take_snapshot(container.places, scratch, own, str(directory), go_on),
        [scratch],
        go_on,
    )


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


def copy(launcher: Launcher, message: Message, fds: list[int]) -> Work:
    """Copy a file or a tree into a container or out of it."""
    launcher.get(message)
    there, here = fds
    return Work(lambda: copy_between(message, there, here), fds)


def update(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Change the limits of a running container."""
    container = launcher.get(message)
    if container.cgroup is None:
        raise UnsupportedError(f"no limits can be kept: {launcher.workshop.footing.no_cgroups}")
    try:
        container.cgroup.update(Limits(**message["limits"]))
    except OSError as error:
        raise SetupError(f"update limits: {error}") from error
    return {}, []


def freeze(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Stop every process of a container where it is, or let them go on."""
    container = launcher.get(message)
    if container.cgroup is None:
        raise UnsupportedError(f"cannot pause: {launcher.workshop.footing.no_cgroups}")
    container.paused = bool(message["frozen"])
    if container.paused:
        container.cgroup.freeze()
    else:
        container.cgroup.thaw()
    return {}, []


def kill(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Kill a container; what it leaves stays to be looked at until it is destroyed."""
    container = launcher.get(message)
    running = _running(message, container)
    container.kill(message.get("reason", "killed"))
    try:
        container.reap()
    except OSError as error:
        raise TeardownError(f"container {container.order.name!r}: {error.strerror}") from error
    return {**container.state(), **running}, []


def enter(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """What a process of the test's own needs to become one of the container's."""
    container = launcher.get(message)
    if not container.alive:
        raise ContainerDied("the container has ended")
    launcher.neighbours.use(container)
    out = [os.dup(container.pidfd)]
    if container.cgroup is not None:
        for path in container.cgroup.procs_files():
            out.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    order = container.order
    reply: Message = {
        "network": order.own_network,
        "time": order.uptime is not None,
        "user": order.userns or launcher.standing.rootless,
        "rootless": launcher.standing.rootless,
        "capabilities": None if order.privileged else list(order.capabilities),
    }
    return reply, out


def network(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Make a network."""
    bridge = launcher.networks.make(message["name"], Subnet(message["subnet"]), message["internet"])
    return {"id": bridge.id, "gateway": bridge.subnet.gateway}, []


def remove_network(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    launcher.networks.remove(message["id"])
    return {}, []


def socket(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """A socket as of a host next door, on the container's first network."""
    container = launcher.get(message)
    if not container.interfaces:
        return {"ip": None}, []
    interface = container.interfaces[0]
    sock = make_socket(
        interface.bridge.hub, launcher.networks.hub(True).netns, sockets.AF_INET, message["type"]
    )
    return {"ip": interface.ip}, [sock.detach()]


def publish(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Forward what connects to a listening socket of the host to a port of a container."""
    container = launcher.get(message)
    pid = forward_port(container, fds[0], int(message["port"]), launcher.networks.hub(True).netns)
    return {"pid": pid}, []


def expose_host(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Make a port of the host's loopback reachable from a container."""
    container = launcher.get(message)
    if not container.alive:
        raise ContainerDied("the container has ended")
    try:
        found = launcher.host_ports.expose(
            container, message["port"], launcher.networks.hub(True).netns
        )
    except OSError as error:
        return wire.dump_oserror(error), []
    write_hosts(container)
    return {"address": found}, []


def import_rootfs(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Unpack a root filesystem into the cache, unless it is there already."""
    found = rootfs.resolve(str(message["source"]), launcher.layer_cache, launcher.run_outside)
    return {"rootfs": found.to_wire()}, []


def try_limits(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Whether limits can be kept, by a cgroup with nobody in it."""
    group = launcher.workshop.footing.make_cgroup("trial", Limits(**message["limits"]))
    if group is not None:
        group.remove()
    return {}, []


def open_way_out(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """Before a container needs it, so that it can be said whether there is one."""
    launcher.way_out.open(launcher.networks.hub(True))
    return {}, []


def describe(launcher: Launcher, message: Message, fds: list[int]) -> Reply:
    """What was found on this host, for the report header."""
    footing = launcher.workshop.footing
    driver = footing.cgroups
    cgroups = driver.describe() if driver else f"no limits: {footing.no_cgroups}"
    found = [launcher.standing.describe(), cgroups, launcher.way_out.describe()]
    return {"host": "; ".join(filter(None, found))}, []


def _running(message: Message, container: Container) -> Message:
    """Who runs in a container, if the request wants to be told."""
    if not message.get("tell") or not container.alive:
        return {}
    return {"running": [f"{pid} ({name})" for pid, name in processes.below_init(container.pid)]}


OPERATIONS: dict[str, Callable[[Launcher, Message, list[int]], Answer]] = {
    operation.__name__: operation
    for operation in (
        changes,
        copy,
        create,
        describe,
        destroy,
        enter,
        expose_host,
        freeze,
        import_rootfs,
        kill,
        network,
        open_way_out,
        publish,
        remove_network,
        snapshot,
        socket,
        state,
        try_limits,
        update,
        use,
    )
}
