"""What a user may ask of a container: the marker's keywords, checked."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pytest_nsbox.errors import SpecError
from pytest_nsbox.model import capabilities
from pytest_nsbox.model.limits import Limits
from pytest_nsbox.model.units import parse_duration, parse_size

NETWORK_MODES = ("nat", "isolated", "none", "host")
_MEMORY_FLOOR = 4 << 20  # below this the kernel kills the first process that is attached


@dataclass(frozen=True)
class Bind:
    """A file or directory of the host shown inside: mount(8) --bind.

    `src` is a path on the host, `dst` an absolute path inside, made where it does not exist.
    """

    src: str | os.PathLike[str]
    dst: str | os.PathLike[str]
    read_only: bool = True


@dataclass(frozen=True)
class Tmpfs:
    """An empty filesystem in memory at `dst` (tmpfs(5)); `size` bounds it, as bytes or "64M"."""

    dst: str | os.PathLike[str]
    size: int | str | None = None


def _cores(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.01 <= value <= 8192:
        raise SpecError("cpus is a number of cores, at least 0.01: cpus=0.5, cpus=2")
    return float(value)


def _cpuset(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", value):
        raise SpecError("cpuset is a list of cores and ranges as a string: cpuset='0,2-3'")
    return value


def _memory(value: Any) -> int:
    size = parse_size(value)
    if size < _MEMORY_FLOOR:
        raise SpecError("memory is at least 4M: with less, not even a shell starts")
    return size


def _disk(value: Any) -> int:
    size = parse_size(value)
    if size < 1 << 16:
        raise SpecError("disk is at least 64K: with less, /etc/hosts does not fit")
    return size


def _pids(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise SpecError("pids is an int of at least 2: PID 1 of the container counts, too")
    return value


def _io(value: Any) -> dict[str, int]:
    known = ("rbps", "wbps", "riops", "wiops")
    if not isinstance(value, Mapping) or not value or not set(value) <= set(known):
        raise SpecError(f"io is a dict of some of {', '.join(known)}: io={{'rbps': '10M'}}")
    limits = {key: parse_size(value[key]) for key in value}
    if any(limit < 1 for limit in limits.values()):
        raise SpecError("an io limit is at least 1")
    return limits


def _rootfs(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "layers") or (isinstance(value, str) and value):
        return value
    raise SpecError(
        "rootfs is 'host', the path of a directory, a tarball, a docker save or OCI archive, "
        "a reference like 'docker://alpine', or a Rootfs"
    )


def _network(value: Any) -> str:
    if value not in NETWORK_MODES:
        raise SpecError(f"network is one of {', '.join(map(repr, NETWORK_MODES))}")
    return str(value)


def _networks(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise SpecError("networks is a list of Network objects, as nsbox_network_factory makes")
    if not all(hasattr(network, "gateway") for network in value):
        raise SpecError("networks is a list of Network objects, as nsbox_network_factory makes")
    return tuple(value)


def _hostname(value: Any) -> str:
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    if not isinstance(value, str) or not re.fullmatch(rf"{label}(\.{label})*", value):
        raise SpecError("hostname is letters, digits and hyphens, with dots between (RFC 1123)")
    if len(value) > 64:
        raise SpecError("hostname has at most 64 characters (sethostname(2))")
    return value


def _strings(name: str) -> Callable[[Any], dict[str, str]]:
    def check(value: Any) -> dict[str, str]:
        if not isinstance(value, Mapping) or not all(
            isinstance(text, str) and "\0" not in text for pair in value.items() for text in pair
        ):
            raise SpecError(f"{name} is a dict of strings")
        return dict(value)

    return check


def _env(value: Any) -> dict[str, str]:
    env = _strings("env")(value)
    if any(not key or "=" in key for key in env):
        raise SpecError("env is a dict of strings; a name is not empty and has no '='")
    return env


def _absolute(name: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value).startswith("/"):
            raise SpecError(f"{name} is an absolute path inside the container")
        return os.fspath(value)

    return check


def _user(value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value in ("",):
        raise SpecError("user is a name, an id, 'name:group' or 'uid:gid'")
    return value


def _addresses(value: Any) -> tuple[str, ...]:
    try:
        if isinstance(value, str):
            raise ValueError
        return tuple(str(ipaddress.ip_address(address)) for address in value)
    except (TypeError, ValueError):
        raise SpecError("dns is a list of IP addresses: dns=['198.51.100.53']") from None


def _hosts(value: Any) -> dict[str, str]:
    hosts = _strings("hosts")(value)
    try:
        return {name: str(ipaddress.ip_address(address)) for name, address in hosts.items()}
    except ValueError:
        raise SpecError("hosts is a dict from names to IP addresses") from None


def _mounts(value: Any) -> tuple[Bind | Tmpfs, ...]:
    allowed = "mounts is a list of Bind(src, dst, read_only=True) and Tmpfs(dst, size)"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise SpecError(allowed)
    for mount in value:
        if not isinstance(mount, (Bind, Tmpfs)):
            raise SpecError(allowed)
        if not os.fspath(mount.dst).startswith("/"):
            raise SpecError(f"{allowed}; dst is absolute")
        if isinstance(mount, Tmpfs) and mount.size is not None:
            parse_size(mount.size)
        if isinstance(mount, Bind) and not os.path.exists(mount.src):
            raise SpecError(f"{os.fspath(mount.src)!r} does not exist; {allowed}")
    return tuple(value)


_NAMESPACED_SYSCTL = re.compile(
    r"net\..+|kernel\.(msg(max|mnb|mni)|sem|shm(all|max|mni|_rmid_forced)|domainname)|fs\.mqueue\..+"
)


def _sysctls(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise SpecError("sysctls is a dict: sysctls={'net.ipv4.ip_forward': 1}")
    for key in value:
        if not isinstance(key, str) or not _NAMESPACED_SYSCTL.fullmatch(key) or ".." in key:
            raise SpecError(
                f"{key!r} is not a namespaced sysctl; allowed are net.*, fs.mqueue.*, "
                "kernel.msg*, kernel.sem, kernel.shm*, kernel.domainname"
            )
    return {key: str(setting) for key, setting in value.items()}


def _flag(name: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise SpecError(f"{name} is True or False")
        return value

    return check


def _capabilities(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SpecError("capabilities is a list: capabilities=['+SYS_ADMIN', '-NET_RAW']")
    capabilities.resolve(value)
    return tuple(value)


def _timeout(value: Any) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise SpecError("timeout is more than 0 seconds")
    return seconds


@dataclass(frozen=True, kw_only=True)
class SandboxSpec:
    """What one container is like. The fields are the keywords of `@pytest.mark.sandbox`.

    None means "no limit" for a limit and "as usual" for the rest. `make` checks every value.
    """

    cpus: float | None = None
    cpuset: str | None = None
    memory: int | None = None
    swap: int | None = None
    pids: int | None = None
    io: Mapping[str, int] | None = None
    disk: int | None = None
    rootfs: Any = "host"
    network: str = "nat"
    networks: tuple[Any, ...] | None = None
    hostname: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | int | None = None
    dns: tuple[str, ...] | None = None
    hosts: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Bind | Tmpfs, ...] = ()
    read_only: bool = False
    sysctls: Mapping[str, str] = field(default_factory=dict)
    uptime: float | None = None
    userns: bool = False
    capabilities: tuple[str, ...] = ()
    privileged: bool = False
    timeout: float | None = None

    @classmethod
    def make(cls, **keywords: Any) -> SandboxSpec:
        """A spec from keywords as a user writes them.

        Raises SpecError naming the keyword, the value and what is allowed.
        """
        return cls().replace(**keywords)

    def replace(self, **keywords: Any) -> SandboxSpec:
        """This spec with some keywords changed, each checked. None takes a keyword back."""
        defaults = SandboxSpec()
        checked = {}
        for name, value in keywords.items():
            if name not in _CHECKS:
                near = difflib.get_close_matches(name, _CHECKS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise SpecError(f"unknown keyword {name!r}{hint} Allowed: {', '.join(_CHECKS)}")
            try:
                checked[name] = getattr(defaults, name) if value is None else _CHECKS[name](value)
            except SpecError as error:
                raise SpecError(f"{name}={value!r}: {error}") from None
        return replace(self, **checked)._consistent()

    def _consistent(self) -> SandboxSpec:
        if self.swap is not None and self.memory is None:
            raise SpecError(f"swap={self.swap!r}: swap is a limit beside memory; set memory, too")
        if self.memory and self.disk and self.disk * 2 > self.memory:
            raise SpecError(
                f"disk={self.disk!r}: a writable layer of limited size lives in memory and counts "
                f"as it; with memory={self.memory} it is at most half of that"
            )
        if self.networks and self.network != "nat":
            raise SpecError(f"network={self.network!r}: networks= already says where it is")
        if not self.own_network and (of_it := [key for key in self.sysctls if key[:4] == "net."]):
            raise SpecError(
                f"sysctls={dict(self.sysctls)!r}: with network='host' {of_it[0]} is the host's "
                "own; set it in another network, such as network='none'"
            )
        return self

    @property
    def own_network(self) -> bool:
        """Whether the container has a network namespace of its own."""
        return bool(self.networks) or self.network != "host"

    def limits(self) -> Limits:
        """The part of this spec that control groups keep."""
        return Limits(
            cpus=self.cpus,
            cpuset=self.cpuset,
            memory=self.memory,
            swap=self.swap,
            pids=self.pids,
            io=self.io,
        )


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "cpus": _cores,
    "cpuset": _cpuset,
    "memory": _memory,
    "swap": parse_size,
    "pids": _pids,
    "io": _io,
    "disk": _disk,
    "rootfs": _rootfs,
    "network": _network,
    "networks": _networks,
    "hostname": _hostname,
    "env": _env,
    "cwd": _absolute("cwd"),
    "user": _user,
    "dns": _addresses,
    "hosts": _hosts,
    "mounts": _mounts,
    "read_only": _flag("read_only"),
    "sysctls": _sysctls,
    "uptime": parse_duration,
    "userns": _flag("userns"),
    "capabilities": _capabilities,
    "privileged": _flag("privileged"),
    "timeout": _timeout,
}
assert list(_CHECKS) == [f.name for f in fields(SandboxSpec)]
