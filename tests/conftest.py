"""Shared by all tests: pytest in a subprocess, with the real plugin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_nsbox import Session
from tests.audit import Snapshot, take
from tests.images import Images


def pytest_configure(config: pytest.Config) -> None:
    """Images are unpacked into a cache of this run's own, gone after it.

    It is below /var/tmp, which is a disk where /tmp may be memory.
    """
    cache = tempfile.mkdtemp(prefix="nsbox-tests-", dir="/var/tmp")
    config.add_cleanup(lambda: _remove_cache(cache))
    os.environ["XDG_CACHE_HOME"] = cache


def _remove_cache(cache: str) -> None:
    if os.geteuid() != 0:  # its files have several owners
        subprocess.run([sys.executable, "-c", _PRUNE], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(cache)


_PRUNE = "from pytest_nsbox.cli import main; raise SystemExit(main(['cache', 'prune']))"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the outer run was given must not reach the runs that tests start."""
    for name in list(os.environ):
        if name.startswith(("PYTEST_NSBOX_", "PYTEST_XDIST")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CI", raising=False)  # hypothesis keeps no examples where it is set
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_nsbox.plugin")


@pytest.fixture
def run_pytest(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run pytest as a user does, on a test file given as text."""

    def run(source: str, *args: str, **files: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=source, **files)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *args)

    return run


@pytest.fixture
def nothing_left(nsbox_session: Session) -> Iterator[Snapshot]:
    """The machine is after the test as it was before."""
    nsbox_session.describe()  # this run's own launcher has started, or it would look left behind
    before = take()
    yield before
    before.must_equal_soon()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Real root filesystems and images, made once by real tools."""
    return Images(tmp_path_factory.mktemp("images"))


def tool(name: str) -> str:
    found = shutil.which(name)
    assert found, f"these tests need {name}; ci/test installs it"
    return found


def command_line() -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def run_tool(*command: str | Path, **options: object) -> str:
    """The output of a program that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return str(done.stdout)


def undisturbed(measure: Callable[[], float], enough: float) -> float:
    """A share of a processor, measured anew while it is less than `enough`: what else runs on the
    machine can take from it and never add to it. The last of a few tries counts in any case."""
    for _ in range(8):
        share = measure()
        if share >= enough:
            break
    return share
