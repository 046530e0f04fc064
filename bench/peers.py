"""The programs that `compare.py` compares with, and the small process that runs them.

Run as a program, this file is that process. It lives in a mount namespace of its own, for two
reasons of crun's: `pivot_root` to `/` itself is refused, so it needs a bind mount of `/`, and on a
host with cgroups of both versions it refuses to run where it sees the second. Both are seen to
once, and count in nobody's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_nsbox.kernel import libc

CPUS, MEMORY, PIDS = 1, 256 << 20, 100
_UNIFIED = "/sys/fs/cgroup/unified"


@dataclass(frozen=True)
class Peer:
    """A program to compare with: the arguments of one run, and the Debian package it is in."""

    name: str
    package: str
    argv: Sequence[str]
    includes: str

    @property
    def installed(self) -> bool:
        return shutil.which(self.argv[0]) is not None

    def version(self) -> str:
        """The first line of `--version`."""
        done = subprocess.run([self.argv[0], "--version"], capture_output=True, text=True)
        return done.stdout.partition("\n")[0].strip()


class PeerError(Exception):
    """A peer has failed; with the last line of what it wrote."""


class Runner:
    """Starts commands one after the other and takes their time; nothing outlives it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._name = f"nsbox-bench-{os.getpid()}"
        rootfs = directory / "rootfs"
        rootfs.mkdir()
        undo = [[*self._crun, "delete", "--force", self._name]] if shutil.which("crun") else []
        # a session of its own, so that Ctrl-C ends this program first, and that ends the process
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(rootfs), json.dumps(undo)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def _crun(self) -> list[str]:
        return ["crun", "--cgroup-manager=cgroupfs", f"--root={self.directory / 'state'}"]

    def peers(self) -> list[Peer]:
        """What there is to compare with, installed or not."""
        true = shutil.which("true") or "/bin/true"
        binds = "--ro-bind / / --dev /dev --proc /proc".split()
        return [
            Peer(
                "crun run",
                "crun",
                [*self._crun, "run", f"--bundle={self.directory}", self._name],
                "5 namespaces, the same limits, / bound read-only; network not wired",
            ),
            Peer(
                "bwrap --unshare-all",
                "bubblewrap",
                ["bwrap", "--unshare-all", *binds, true],
                "all namespaces, / bound read-only; no limits, network not wired",
            ),
            Peer(
                "unshare -muinp -f",
                "util-linux",
                ["unshare", "-muinp", "-f", true],
                "5 namespaces, nothing in them",
            ),
            Peer("fork and exec", "coreutils", [true], "nothing"),
        ]

    def write_config(self) -> None:
        """crun's own default configuration, with our limits and the host's files."""
        subprocess.run(["crun", "spec"], cwd=self.directory, check=True)
        path = self.directory / "config.json"
        config: dict[str, Any] = json.loads(path.read_text())
        config["process"].update(terminal=False, args=[shutil.which("true") or "/bin/true"])
        config["root"] = {"path": str(self.directory / "rootfs"), "readonly": True}
        config["linux"]["cgroupsPath"] = f"/{self._name}"
        config["linux"]["resources"].update(
            cpu={"quota": CPUS * 100_000, "period": 100_000},
            memory={"limit": MEMORY},
            pids={"limit": PIDS},
        )
        path.write_text(json.dumps(config))

    def seconds(self, argv: Sequence[str]) -> float:
        """Run a command to its end; how long it took. Raises PeerError when it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(list(argv)), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '{"error": "has ended"}')
        if "error" in answer:
            raise PeerError(f"{argv[0]}: {answer['error']}")
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process; it lets its command finish and removes what crun may have left."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def engines(stack: ExitStack, directory: Path) -> tuple[list[Peer], dict[str, str]]:
    """Docker and podman, where they answer, as in `ci/engines`, and why others do not. Each has an
    image of its own, with busybox alone, until `stack` is left."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    archive = directory / "busybox.tar"
    busybox = shutil.which("busybox")
    for engine, package in (("docker", "docker.io"), ("podman", "podman")):
        name = f"{engine} run --rm"
        if shutil.which(engine) is None:
            missing[name] = "not installed"
        elif subprocess.run([engine, "ps"], capture_output=True).returncode:
            missing[name] = "no daemon answers" if engine == "docker" else "it fails"
        elif busybox is None:
            missing[name] = "its image needs the package busybox-static"
        else:
            if not archive.exists():
                with tarfile.open(archive, "w") as tar:
                    tar.add(busybox, "bin/true")
            image = f"nsbox-bench-{os.getpid()}"
            subprocess.run([engine, "import", archive, image], check=True, capture_output=True)
            stack.callback(subprocess.run, [engine, "rmi", "-f", image], capture_output=True)
            limits = [f"--cpus={CPUS}", f"--memory={MEMORY}", f"--pids-limit={PIDS}"]
            if "ENGINES_CGROUP" in os.environ:  # of ci/engines, which removes it
                limits.append(f"--cgroup-parent={os.environ['ENGINES_CGROUP']}")
            argv = [engine, "run", "--rm", *limits, image, "/bin/true"]
            found.append(Peer(name, package, argv, "all: bridge, NAT, limits, overlay, seccomp"))
    return found, missing


def _enter_namespace(rootfs: str) -> None:
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
    libc.mount("/", rootfs, None, libc.MS_BIND)
    # read-only, so that no clean-up could ever reach the host through it
    libc.mount("none", rootfs, None, libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY)
    if os.path.ismount(_UNIFIED):
        libc.umount2(_UNIFIED, libc.MNT_DETACH)


def _run(argv: list[str], errors: int) -> dict[str, Any]:
    """posix_spawn(3) is the cheapest start there is, so it flatters every peer alike."""
    os.ftruncate(errors, 0)
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, errors, 2),
    ]
    path = shutil.which(argv[0]) or argv[0]
    start = time.perf_counter()
    pid = os.posix_spawn(path, argv, os.environ, file_actions=actions)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        said = os.pread(errors, 10_000, 0).decode(errors="replace").strip()
        return {"error": said.rpartition("\n")[2] or f"wait status {status:#x}"}
    return {"seconds": seconds}


def main(rootfs: str, undo: list[list[str]]) -> None:
    """Run what standard input asks for, a JSON list of arguments per line, until it ends."""
    _enter_namespace(rootfs)
    errors = os.memfd_create("errors")
    os.set_inheritable(errors, False)
    try:
        for line in sys.stdin:
            print(json.dumps(_run(json.loads(line), errors)), flush=True)
    except BrokenPipeError:
        pass  # the other end was killed
    finally:
        for argv in undo:
            _run(argv, errors)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
