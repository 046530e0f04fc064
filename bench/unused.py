"""How long pytest takes to collect nothing, with plugins and without.

A process that has done it before forks for each time, so that nothing is in it but what is to be
measured: not Python's start, not pytest's own imports, which take a hundred times as long as what
a plugin adds, and differ by more. In the fork, the plugins' modules are as if never imported.

Run by `suites.py` in an empty directory: a line of plugins is answered with a line of seconds.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest

_ARGUMENTS = ["-q", "-p", "no:cacheprovider", "--collect-only"]


class Collector:
    """The program, started."""

    def __init__(self, directory: Path, plugins: str, env: dict[str, str]) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "pytest.ini").write_text("[pytest]\n")
        self._process = subprocess.Popen(
            [sys.executable, __file__, plugins],
            cwd=directory,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def seconds(self, plugins: str) -> float:
        assert self._process.stdin
        assert self._process.stdout
        print(plugins, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def _collect(plugins: str) -> float:
    os.environ["PYTEST_PLUGINS"] = plugins
    began = time.perf_counter()
    code = pytest.main(_ARGUMENTS)
    took = time.perf_counter() - began
    if code != pytest.ExitCode.NO_TESTS_COLLECTED:
        raise SystemExit(f"pytest with PYTEST_PLUGINS={plugins} ended with {code!r}")
    return took


def _forget(packages: set[str]) -> None:
    """Have these imported anew."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]
    for path in list(sys.path_importer_cache):
        if packages & set(Path(path).parts):
            del sys.path_importer_cache[path]


def main() -> None:
    every = sys.argv[1]
    packages = {name.partition(".")[0] for name in every.split(",")}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # pytest says that there are no tests
    _collect(every)  # writes compiled code, where there is none
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            # all memory that a run writes to is the child's own from here on
            _collect(every)
            _forget(packages)
            print(_collect(line.strip()), file=answers, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:  # it has said why, and there is no answer to wait for
            sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
