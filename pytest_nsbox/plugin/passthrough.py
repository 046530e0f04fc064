"""The paths that a body shares with the host, writable."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox.plugin import options


def passthrough(config: pytest.Config) -> list[str]:
    """Directories of pytest and of plugins that outlive a test, and what the user adds."""
    found: list[Path] = []
    temporary = getattr(config, "_tmp_path_factory", None)
    if temporary is not None:
        found.append(temporary.getbasetemp())
    cache: Any = getattr(config, "cache", None)
    if cache is not None:
        with contextlib.suppress(OSError):
            cache._ensure_cache_dir_and_supporting_files()
        found.append(cache._cachedir)
    found += _examples()
    for path in options.paths(config):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
        found.append(path)
    return list(dict.fromkeys(os.fspath(path) for path in found if path.exists()))


def _examples() -> list[Path]:
    """Where hypothesis keeps the examples that have failed."""
    hypothesis = sys.modules.get("hypothesis.configuration")
    if hypothesis is None:
        return []
    found = hypothesis.storage_directory()
    path = Path(getattr(found, "path", found))
    with contextlib.suppress(OSError):
        getattr(found, "create_if_missing", lambda: path.mkdir(exist_ok=True))()
    return [path]
