"""Extension modules of a body on an image find the libraries that they would find outside.

The loader of the process would take those of the image, which may not be there or ask for another
C library than the one that the process has had from its start. One that is loaded already is taken
for every library that asks for its name (ld.so(8)), so those of the host are loaded first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType

from pytest_nsbox.kernel import libc
from pytest_nsbox.model import elf


def prefer(libraries: Mapping[str, str]) -> None:
    """From here on, where a module asks for one of these names, load what is at that path."""
    preferred = _Preferred(libraries)
    create = ExtensionFileLoader.create_module

    def create_module(self: ExtensionFileLoader, spec: ModuleSpec) -> ModuleType:
        preferred.load_for(spec.origin)
        return create(self, spec)

    ExtensionFileLoader.create_module = create_module  # type: ignore[method-assign]


class _Preferred:
    def __init__(self, libraries: Mapping[str, str]) -> None:
        self._libraries = libraries
        self._seen: set[str] = set()

    def load_for(self, path: str | None) -> None:
        """The libraries that a file needs, each after those that it needs itself."""
        found = None if path is None or path in self._seen else elf.read(path)
        if found is None or path is None:
            return
        self._seen.add(path)
        for name in found.needed:
            own = (os.path.join(directory, name) for directory in found.search)
            beside = next(filter(os.path.exists, own), None)
            library = self._libraries.get(name) if beside is None else beside
            if library is None or libc.is_loaded(name):
                continue
            self.load_for(library)
            if beside is None:
                with contextlib.suppress(OSError):  # the import says what is missing
                    libc.dlopen(library)
