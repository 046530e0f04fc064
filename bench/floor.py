"""The floor: a container in as few system calls as can be, one after the other, and no features.

    .venv/bin/python bench/floor.py [COUNT]

It makes what one of ours has: namespaces for mounts, network, processes, IPC, host name and
control groups; a control group limited in processor, memory and processes; a veth on a bridge, with
an address and a route; an overlay on `/`, pivoted to, with a `/proc`. It executes `true` in it,
waits, and removes what the kernel does not. Nothing is checked, recorded or confined, there is no
/dev, nobody can be asked to run a second command, and a kill leaves what there is.

The program is a small process of its own, as the peers' is, and imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

CLONE_NEWCGROUP, CLONE_INTO_CGROUP, CLONE_NEWNET = 0x02000000, 0x200000000, 0x40000000
CLONE_NEWNS = 0x00020000
_NEW = CLONE_NEWNS | CLONE_NEWNET | 0x04000000 | 0x08000000 | 0x20000000  # UTS, IPC, PID
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
SYS_CLONE3 = 435  # on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE = 16, 20, 24
_REQUEST, _ACK, _CREATE = 1, 4, 0x600  # NLM_F_CREATE | NLM_F_EXCL
_LO, _ETH0 = 1, 2
_GATEWAY, _ADDRESS, _PREFIX = "172.28.0.1", "172.28.0.2", 16

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, *arguments: Any) -> int:
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


# ---------------------------------------------------------------------- rtnetlink(7)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", len(body) + 16, kind, flags | _REQUEST, 0, 0) + body


def _link(index: int, *attributes: bytes, up: bool = True) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, up, up) + b"".join(attributes)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _name(name: str) -> bytes:
    return _attribute(3, name.encode() + b"\0")


def _info(kind: bytes, data: bytes = b"") -> bytes:
    return _attribute(18, _attribute(1, kind) + (_attribute(2, data) if data else b""))


def _address(index: int, address: str) -> bytes:
    packed = socket.inet_aton(address)
    body = struct.pack("=BBBBi", socket.AF_INET, _PREFIX, 0, 0, index)
    return body + _attribute(1, packed) + _attribute(2, packed)


def _default_route(gateway: str) -> bytes:
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 3, 0, 1, 0)
    return body + _attribute(5, socket.inet_aton(gateway))


def _netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)


def _exchange(sock: socket.socket, messages: bytes) -> None:
    """The last of the messages is acknowledged; one that is refused says so by itself."""
    sock.send(messages)
    number = -struct.unpack_from("=i", sock.recv(1 << 12), 16)[0]
    if number:
        raise OSError(number, f"netlink: {os.strerror(number)}")


# ---------------------------------------------------------------------- the program


class Program:
    """`cgroups` are directories, each with the limits to write below it; on version 2 one."""

    def __init__(self, cgroups: dict[str, dict[str, str]], unified: bool, root: str) -> None:
        self._cgroups = list(cgroups.items())
        self._unified = unified
        self._root = root
        self._true = shutil.which("true") or "/bin/true"
        self._number = 0
        self._pivot_root = SYS_PIVOT_ROOT[os.uname().machine]
        _call("unshare", CLONE_NEWNS | CLONE_NEWNET)  # a copy of the mounts, and the hub
        _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        self._hub = _netlink()
        bridge = _link(0, _name("bridge"), _info(b"bridge"))
        _exchange(self._hub, _message(RTM_NEWLINK, _CREATE | _ACK, bridge))
        self._bridge = socket.if_nametoindex("bridge")
        address = _address(self._bridge, _GATEWAY)
        _exchange(self._hub, _message(RTM_NEWADDR, _CREATE | _ACK, address))
        self._inside = b"".join(
            [
                _message(RTM_NEWLINK, 0, _link(_LO)),
                _message(RTM_NEWADDR, _CREATE, _address(_ETH0, _ADDRESS)),
                _message(RTM_NEWLINK, 0, _link(_ETH0)),
                _message(RTM_NEWROUTE, _CREATE | _ACK, _default_route(_GATEWAY)),
            ]
        )

    def once(self) -> None:
        """One container."""
        self._number += 1
        groups = []
        for directory, limits in self._cgroups:
            path = f"{directory}/{self._number}"
            os.mkdir(path)
            groups.append(path)
            for name, value in limits.items():
                _write(f"{path}/{name}", value)
        flags, group = _NEW, -1
        if self._unified:
            group = os.open(groups[0], os.O_RDONLY | os.O_CLOEXEC)
            flags |= CLONE_INTO_CGROUP
        # struct clone_args of clone(2)
        arguments = struct.pack(
            "=11Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, max(group, 0)
        )
        pid = _call("syscall", SYS_CLONE3, arguments, len(arguments))
        if pid == 0:
            self._inside_of(groups)
        _, status = os.waitpid(pid, 0)
        if group >= 0:
            os.close(group)
        for path in groups:
            os.rmdir(path)
        if status:
            raise OSError(f"a container ended with wait status {status:#x}")

    def _inside_of(self, groups: list[str]) -> NoReturn:
        try:
            if not self._unified:
                for path in groups:
                    _write(f"{path}/tasks", "0")
            _call("unshare", CLONE_NEWCGROUP)
            # both ends at once; the other one goes to the namespace of process 1, this one
            peer = _attribute(1, _link(_ETH0, _name("eth0"), _u32(19, 1), up=False))
            name = _name(f"v{self._number}")
            veth = _link(0, name, _u32(10, self._bridge), _info(b"veth", peer))
            _exchange(self._hub, _message(RTM_NEWLINK, _CREATE | _ACK, veth))
            _exchange(_netlink(), self._inside)
            root = self._root
            _call("mount", b"tmpfs", root.encode(), b"tmpfs", 0, None)
            for directory in ("upper", "work", "root"):
                os.mkdir(f"{root}/{directory}")
            layers = f"lowerdir=/,upperdir={root}/upper,workdir={root}/work".encode()
            _call("mount", b"overlay", f"{root}/root".encode(), b"overlay", 0, layers)
            os.chdir(f"{root}/root")
            _call("syscall", self._pivot_root, b".", b".")
            _call("umount2", b".", MNT_DETACH)
            _call("mount", b"proc", b"/proc", b"proc", 0, None)
            os.execv(self._true, ["true"])
        except BaseException as error:
            os.write(2, f"floor: {error}\n".encode())
        finally:
            os._exit(1)


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, value.encode())
    os.close(fd)


def run(cgroups: dict[str, dict[str, str]], unified: bool, root: str) -> None:
    """Make as many as a line of standard input says, and answer how long it took."""
    try:
        program = Program(cgroups, unified, root)
        gc.freeze()  # a collection in a child would copy every page with an object in it
        gc.disable()
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                program.once()
            print(time.perf_counter() - start, flush=True)
    finally:
        for directory in cgroups:
            os.rmdir(directory)


# ---------------------------------------------------------------------- its handle


class Floor:
    """Starts the program. `directory` is for it alone; limits are the same as the peers'."""

    def __init__(self, directory: Path, name: str = "floor") -> None:
        from peers import CPUS, MEMORY, PIDS

        from pytest_nsbox.kernel import cgroup
        from pytest_nsbox.model.limits import Limits

        root = directory / name
        root.mkdir()
        driver = cgroup.detect(f"nsbox-{name}-{os.getpid()}")
        driver.create("first", Limits(cpus=CPUS, memory=MEMORY, pids=PIDS)).remove()
        quota = str(CPUS * 100_000)
        limits = {
            "cpu": {"cpu.cfs_quota_us": quota},  # per 100 ms, as it is from the start
            "memory": {"memory.limit_in_bytes": str(MEMORY)},
            "pids": {"pids.max": str(PIDS)},
        }
        if driver.version == 2:
            files = {"cpu.max": quota, "memory.max": str(MEMORY), "pids.max": str(PIDS)}
            cgroups = {driver.session_paths()[0]: files}
        else:
            cgroups = {driver.session(name): files for name, files in limits.items()}
        others = [path for path in driver.session_paths() if path not in cgroups]
        for path in filter(os.path.isdir, others):
            os.rmdir(path)
        arguments = json.dumps([cgroups, driver.version == 2, str(root)])
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as the peers' process
        )

    def begin(self, count: int) -> None:
        """Have it make some containers; `end` waits for them."""
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)

    def end(self) -> float:
        """Seconds that these have taken."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the floor program has failed")
        return float(line)

    def seconds(self, count: int = 1) -> float:
        self.begin(count)
        return self.end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def main() -> None:
    import statistics
    import tempfile

    count = int(sys.argv[1]) if sys.argv[1:] else 100
    with tempfile.TemporaryDirectory(prefix="floor-") as directory:
        with Floor(Path(directory)) as floor:
            floor.seconds(10)
            times = [floor.seconds() * 1e3 for _ in range(count)]
    print(f"{statistics.median(times):.2f} ms, the median of {count}; {min(times):.2f} at least")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("["):
        run(*json.loads(sys.argv[1]))
    else:
        main()
