"""What the sections share: the floor program, the peers, a session, runs of pytest."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from floor import Floor
from peers import CPUS, MEMORY, PIDS, Peer, PeerError, Runner, engines
from report import FLOOR, Case, timed

from pytest_nsbox import Container, Session

LIMITS: dict[str, Any] = {"cpus": CPUS, "memory": MEMORY, "pids": PIDS}
OURS, CRUN, BWRAP = "nsbox", "crun run", "bwrap --unshare-all"
ROOT = Path(__file__).resolve().parent.parent


def plugins_only(plugins: str) -> dict[str, str]:
    """An environment in which pytest has these plugins of others and no more."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # not by -p, for which pytest looks through all that is installed
    env["PYTEST_PLUGINS"] = ",".join(plugins.split())
    return env


class Bench:
    """`directory` is empty, and on a disk: layers of containers whose memory is limited are."""

    def __init__(self, stack: ExitStack, directory: Path, runs: int, count: int) -> None:
        self.runs, self.count = runs, count
        self.stack = ExitStack()  # what one section needs for itself
        self.directory = directory
        self._whole = stack
        self.versions: list[str] = []
        self.missing: dict[str, str] = {}  # peers that are not measured, and why

    @cached_property
    def floor_program(self) -> Floor:
        return self._whole.enter_context(Floor(self.directory))

    @cached_property
    def floor(self) -> Case:
        includes = "6 namespaces; the same limits; veth on a bridge, address, route; overlay on /"
        return Case(FLOOR, self.floor_program.seconds, includes)

    @cached_property
    def runner(self) -> Runner:
        return self._whole.enter_context(Runner(self.directory))

    @cached_property
    def cold(self) -> Session:
        """A session that makes nothing ahead."""
        return self.session(self._whole, pool=0)

    def session(self, stack: ExitStack, pool: int) -> Session:
        return stack.enter_context(Session(pool=pool, cache=self.directory / "cache"))

    # ------------------------------------------------------------------ peers

    @cached_property
    def peers(self) -> list[Peer]:
        """Those that run here."""
        return [peer for peer in self.runner.peers() if self._works(peer)]

    @cached_property
    def engines(self) -> list[Peer]:
        """Docker and podman, where they run here, with an image of their own for as long."""
        found, self.missing_engines = engines(self._whole, self.directory)
        return [peer for peer in found if self._works(peer)]

    def _works(self, peer: Peer) -> bool:
        if not peer.installed:
            self.missing[peer.name] = f"not installed: package {peer.package}"
            return False
        try:
            if peer.name == CRUN:
                self.runner.write_config()
            self.runner.seconds(peer.argv)
        except (PeerError, subprocess.CalledProcessError) as error:
            self.missing[peer.name] = f"it fails: {error}"
            return False
        self.versions.append(peer.version())
        return True

    def remarks(self) -> list[str]:
        return [f"{name} is left out; {why}." for name, why in self.missing.items()]

    def peer(self, peer: Peer) -> Case:
        return Case(peer.name, lambda: self.runner.seconds(peer.argv), peer.includes)

    def peer_named(self, name: str) -> list[Case]:
        return [self.peer(peer) for peer in self.peers if peer.name == name]

    @staticmethod
    def life(session: Session, **keywords: Any) -> Callable[[], float]:
        """A container's, with one command in it."""

        def once() -> None:
            with session.container(**keywords) as container:
                container.run(["true"], check=True)

        return timed(once)

    def running(self) -> Container:
        return self.stack.enter_context(self.cold.container(**LIMITS))

    # ------------------------------------------------------------------ pytest

    def pytest(
        self,
        name: str,
        text: str,
        expect: str,
        *options: str,
        conftest: str = "",
        plugins: str,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Callable[[], float]:
        """A run of pytest over a file of its own, and `more`, as a subprocess, with no plugin but
        `plugins`; `expect` is in its output."""
        directory = self.directory / name
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir()
        (directory / "pytest.ini").write_text("[pytest]\n")
        (directory / "conftest.py").write_text(conftest)
        for file, content in {"test_it.py": text, **more}.items():
            (directory / file).write_text(content)
        env = plugins_only(plugins)
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]

        def once() -> None:
            done = subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True)
            if expect not in done.stdout:
                raise SystemExit(f"{shlex.join(argv)} went wrong:\n{done.stdout}{done.stderr}")

        return timed(once)
