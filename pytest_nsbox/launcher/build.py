"""One container, built and taken down. The order of building is written in `begin`, which does
what is the same for all containers of a kind, and `finish`, which makes one of them somebody;
taking down is that list backwards."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pytest_nsbox import wire
from pytest_nsbox.errors import NsboxError, SetupError, UnsupportedError
from pytest_nsbox.init.setup import Kind
from pytest_nsbox.kernel import libc, mounts
from pytest_nsbox.kernel.namespaces import Home
from pytest_nsbox.launcher import ledger, names
from pytest_nsbox.launcher.container import Container
from pytest_nsbox.launcher.cover import lay_cover, place_of_cover
from pytest_nsbox.launcher.footing import Footing
from pytest_nsbox.launcher.janitor import Janitor
from pytest_nsbox.launcher.tree import Ground, Planner
from pytest_nsbox.launcher.undo import Undo
from pytest_nsbox.launcher.wiring import (
    MOST_AT_ONCE,
    Joiner,
    confirm,
    connect,
    have_connected,
    join,
)
from pytest_nsbox.launcher.zygote import VISITED, VISITED_AGAIN, Init, InitFailed, Zygote, apart_by
from pytest_nsbox.model.order import Order

_PATIENCE = 20.0  # seconds until a kernel that does not answer is an error
_SPELLS = 10  # of waiting, in these: see _next_word


@dataclass
class Workshop:
    """What every container of a session is built with."""

    footing: Footing
    ledger: ledger.Ledger
    zygote: Zygote
    janitor: Janitor
    home: Home
    planner: Planner = field(default_factory=Planner)
    in_userns: bool = False  # every mount is made in a user namespace
    cover: str | None = None  # then: the directory laid over the host's root
    may_pivot: bool = True  # or a filter of system calls refuses it


def begin(
    id: int, order: Order, workshop: Workshop, joiners: Sequence[Joiner] | None = None
) -> Container:
    """Fork a container, which then builds all of itself that does not depend on its name, its
    networks and its neighbours. With `joiners` it is to be the one that is ordered, and what can be
    done for that meanwhile is.

    Raises an NsboxError, and leaves nothing, when a step fails; what fails in the container
    itself is raised by `finish`.
    """
    container = Container(id, order, Undo())
    with _or_nothing(container):
        _promise_undo(container, workshop)
        in_userns = order.userns or workshop.in_userns
        # pivot_root(2) is for all processes of a namespace, what replaces it for who calls it
        visited = workshop.may_pivot and not in_userns
        size = _size(order)
        foundation = workshop.planner.foundation(order, size, in_userns)
        init = _fork(container, in_userns, foundation, workshop)
        # a sysctl of its network may be about interfaces to come, so it has to be set before
        set_before = bool(init.foundation) or not order.sysctls
        if joiners is not None and len(joiners) <= MOST_AT_ONCE and visited and set_before:
            join(container, joiners)
            have_connected(container)
        container.cgroup = workshop.footing.cgroup_for(id, order)
        container.layer = workshop.footing.layer_for(id, order)
        ground = Ground(
            layer=container.layer,
            size=size,
            cgroups={} if container.cgroup is None else container.cgroup.hierarchies(),
            in_userns=in_userns,
            cover=_cover(order, workshop),
        )
        _check_snapshot(order, ground)
        tree = workshop.planner.plan(order, ground)
        steps = tree.steps if init.foundation else [*foundation, *tree.steps]
        _order(container, None if visited else steps)
        container.places = tree.places
        container.own_paths = tree.own_files
        if visited:
            _build(container, init, steps, workshop.home)
    return container


def finish(
    container: Container,
    order: Order,
    joiners: Iterable[Joiner],
    home: Home,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Make a container that has been begun the one that is ordered. `meanwhile` is done when it
    has its addresses.

    Raises an NsboxError, and leaves nothing of it, when a step fails.
    """
    with _or_nothing(container):
        by_itself = container.connected
        if not by_itself:
            container.order = order
            join(container, joiners)
            _name_and_connect(container, home)
            meanwhile()
        _, fds = _await(container, "ready")
        if by_itself:
            confirm(container, fds)
            meanwhile()
        for fd in fds:
            _hold(container, fd)
        _write_own_files(container)
        for interface in container.interfaces:
            interface.bridge.hub.netlink.settle(interface.port)


def _promise_undo(container: Container, workshop: Workshop) -> None:
    """What is undone last is made after what is undone before it: init is there first, as it has
    something to do meanwhile."""

    def remove_layer() -> None:
        if container.layer is not None:
            workshop.footing.remove_layer(container.layer)

    def remove_cgroup() -> None:
        # whoever has not ended by then will not while its cgroup is waited for
        if container.cgroup is not None:
            container.cgroup.remove(patient=not container.alive)

    container.undo.push("rmdir cgroup", remove_cgroup)
    container.undo.push("remove its layer", remove_layer)
    container.undo.push("let go of its mounts", lambda: _let_go(container, workshop.janitor))


def _build(container: Container, init: Init, steps: Sequence[mounts.Step], home: Home) -> None:
    """Pay a visit, and take the steps to its file tree; name it if it is somebody already."""
    if init.root < 0:
        init.root = _await_apart(container)["root"]
    kinds = VISITED_AGAIN if init.foundation else VISITED
    try:
        with home.away(dict.fromkeys(kinds, container.pidfd), init.root):
            if container.connected:
                libc.sethostname(container.order.hostname)
            scratch = mounts.build(steps)
    except ProcessLookupError:
        _await(container, "ready")  # which says why it has ended
        raise
    finally:
        os.close(init.root)
        init.root = -1
    _hold(container, scratch)


def _await_apart(container: Container) -> dict[str, int]:
    """Until it has namespaces of its own; what it hands out of them."""
    return apart_by(_await(container, "apart"))


def _let_go(container: Container, janitor: Janitor) -> None:
    """What the user has mounted is free when the container is closed; all else is the kernel's."""
    mounts, container.mounts = container.mounts, -1
    if container.order.mounts:
        wire.close_all([mounts])
    elif mounts >= 0:
        janitor.let_go(mounts)


def _hold(container: Container, scratch: int) -> None:
    """The way to what it writes."""
    container.scratch = scratch
    container.undo.push("close the scratch filesystem", lambda: os.close(scratch))


@contextlib.contextmanager
def _or_nothing(container: Container) -> Iterator[None]:
    """Undo what has been done of a container when something fails."""
    try:
        yield
    except OSError as error:
        failed = SetupError(f"container {container.order.name!r}: {error.strerror or error}")
        container.undo.run_after(failed)
        raise failed from error
    except BaseException as error:
        container.undo.run_after(error)
        raise


def _reach(container: Container) -> str:
    """As `network` has it: what of the outside is within reach."""
    bridges = [interface.bridge for interface in container.interfaces]
    if not bridges:
        return container.order.network
    return "nat" if any(bridge.hub.way_out for bridge in bridges) else "isolated"


def hosts_of(container: Container) -> bytes:
    """What is to be in its /etc/hosts: itself, and once something runs in it, all it shares a
    network with."""
    own = container.order
    names_of_own = own.hostname if own.hostname == own.name else f"{own.hostname} {own.name}"
    host = [(address, names.OF_THE_HOST) for address, _ in container.host_ports.values()][:1]
    address = container.interfaces[0].ip if container.interfaces else "127.0.1.1"
    neighbours = [
        line
        for interface in (container.interfaces if container.used else ())
        for number, line in interface.bridge.members.items()
        if number != interface.number
    ]
    return names.hosts([(address, names_of_own), *host], neighbours, own.hosts).encode()


def changes(container: Container) -> int:
    """How often somebody has come to the networks of a container, or gone, so far."""
    return sum(interface.bridge.changes for interface in container.interfaces)


def _check_snapshot(order: Order, ground: Ground) -> None:
    """What is written to the host's root is kept by directory in a user namespace."""
    if order.frozen and not order.layers and order.by_directory != ground.in_userns:
        taken = "with" if order.by_directory else "without"
        raise UnsupportedError(
            f"the snapshot of the host's root is of a container {taken} userns=True; "
            "start from it one that is like it"
        )


def _cover(order: Order, workshop: Workshop) -> str | None:
    """The user's own layer over the host's root, made when the first container needs it."""
    if not workshop.in_userns or order.layers:
        return None
    if workshop.cover is None:
        path = place_of_cover() / f"nsbox-{workshop.ledger.name}-0"  # as if of a container 0
        workshop.ledger.record(ledger.LAYER, str(path))
        lay_cover(path)
        workshop.cover = str(path)
    return workshop.cover


def _size(order: Order) -> int | None:
    """Where memory is limited, a large file has to fail by ENOSPC on what is a tmpfs, /run at
    least, before the container is killed for it; the other half is for its processes."""
    if order.disk is not None or order.limits.memory is None:
        return order.disk
    return order.limits.memory // 2


def _fork(
    container: Container, in_userns: bool, foundation: Sequence[mounts.Step], workshop: Workshop
) -> Init:
    """Have PID 1 forked, or take one that was forked ahead."""
    order = container.order
    kind = Kind(
        network=order.own_network,
        uptime=order.uptime,
        own_userns=order.userns,
        in_userns=in_userns,
        capabilities=None if order.privileged else order.capabilities,
    )
    try:
        init = workshop.zygote.fork_init(kind, foundation)
    except InitFailed as error:
        raise _init_failed(order, *error.args) from None
    container.pid, container.pidfd, container.init = init.pid, init.pidfd, init.line
    container.alive = True
    container.undo.push("close init's socket", init.line.close)
    container.undo.push("close pidfd", lambda: os.close(container.pidfd))
    container.undo.push("reap init", container.reap)
    container.undo.push("kill init", lambda: container.kill("stopped"))
    container.undo.push("close its root", lambda: wire.close_all([init.root]))
    init.line.settimeout(_PATIENCE / _SPELLS)
    return init


def _order(container: Container, steps: Sequence[mounts.Step] | None) -> None:
    """Have init begin; it takes `steps` itself, if any."""
    with contextlib.ExitStack() as opened:
        container.line, init_end = wire.pair()
        opened.enter_context(init_end)
        container.undo.push("close the session's line", container.line.close)
        fds = [init_end.fileno()]
        if container.cgroup is not None:
            for path in container.cgroup.procs_files():
                fds.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
                opened.callback(os.close, fds[-1])
        message = {} if steps is None else {"steps": mounts.to_wire(steps)}
        assert container.init is not None
        # why it has ended, if it has, is said when it is listened to
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(container.init, message, fds)


def _name_and_connect(container: Container, home: Home) -> None:
    """Give it its name and connect it with its networks."""
    with contextlib.ExitStack() as opened:
        found = {} if container.scratch >= 0 else _await_apart(container)
        opened.callback(wire.close_all, found.values())
        namespaces = {kind: found.get(kind, container.pidfd) for kind in ("uts", "net")}
        opened.enter_context(home.away(namespaces))
        libc.sethostname(container.order.hostname)
        if container.order.own_network:
            connect(container)


def _write_own_files(container: Container) -> None:
    order = container.order
    hosts = hosts_of(container)
    container.own_files = {
        names.HOSTNAME: f"{order.hostname}\n",
        names.RESOLV_CONF: names.resolv_conf(
            order.dns,
            _reach(container),
            next((i.bridge.hub.name_server for i in container.interfaces), None),
        ),
    }
    container.hosts, container.hosts_size = [hosts], len(hosts)
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    for name, path in container.own_paths.items():
        fd = os.open(path, flags, dir_fd=container.scratch)
        if name == names.HOSTS:
            container.hosts_fd = fd
            container.undo.push("close its hosts", lambda: os.close(container.hosts_fd))
            _write_all(fd, name, hosts)
        else:
            try:
                _write_all(fd, name, container.own_files[name].encode())
            finally:
                os.close(fd)


def _write_all(fd: int, name: str, data: bytes) -> None:
    if os.write(fd, data) < len(data):
        raise OSError(errno.ENOSPC, f"write {name}: {os.strerror(errno.ENOSPC)}")


def _await(container: Container, what: str) -> tuple[wire.Message, list[int]]:
    """The next word from init. Raises what it failed with."""
    assert container.init is not None
    received = _next_word(container.init)
    if received is None:
        raise OSError(104, _how_init_ended(container))
    message, fds = received
    if "error" in message:
        raise _init_failed(container.order, message["error"])
    if message.get("op") != what:
        raise OSError(71, f"init says {message!r} instead of {what!r}")
    return message, fds


def _next_word(init: socket.socket) -> tuple[wire.Message, list[int]] | None:
    """The time that a freezer, a debugger or a hypervisor takes from both is not init's, and in
    poll(2) it is over at once when they go on: then one spell is lost, and not all patience."""
    for _ in range(_SPELLS):
        with contextlib.suppress(TimeoutError):
            return wire.receive(init)
    raise OSError(errno.ETIMEDOUT, f"init says nothing for {_PATIENCE:.0f} s")


def _init_failed(order: Order, error: wire.Message) -> NsboxError:
    """What the kernel refuses as a whole is no fault of the container that was asked for."""
    text = f"container {order.name!r}: {error['text']}"
    if error.get("errno") not in (errno.EPERM, errno.ENOSYS):
        return SetupError(text)
    if "mount proc" in text and order.userns:
        return UnsupportedError(
            f"userns=True: {text}; the container that this runs in masks parts of /proc, and the "
            "kernel then refuses another one below a user namespace (docker run --security-opt "
            "systempaths=unconfined, podman run --security-opt unmask=ALL)"
        )
    return UnsupportedError(
        f"{text}; a capability is missing, or a filter of system calls or AppArmor refuses it (in "
        "a container: docker run --privileged); `nsbox doctor` tries each part and names the cure"
    )


def _how_init_ended(container: Container) -> str:
    if container.cgroup is not None and container.cgroup.oom_kills():
        return "init was killed: out of memory while the container was built; raise memory="
    return "init has ended while the container was built"
