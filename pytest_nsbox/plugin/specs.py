"""Which container a test asks for: options, the nsbox_spec fixture, markers, the hook."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nsbox.plugin import options
from pytest_nsbox.plugin.options import MARKER

if TYPE_CHECKING:
    from pytest_nsbox.model.spec import SandboxSpec


def keywords(item: pytest.Item) -> dict[str, Any]:
    """The markers on class, module and function, merged key by key, the nearest last."""
    from pytest_nsbox.errors import SpecError

    merged: dict[str, Any] = {}
    for marker in reversed(list(item.iter_markers(MARKER))):
        if marker.args:
            raise SpecError(
                f"{marker.args[0]!r}: the marker takes keywords only, as in sandbox(cpus=1)"
            )
        merged.update(marker.kwargs)
    source = merged.get("rootfs")
    if isinstance(source, (str, os.PathLike)) and os.fspath(source) != "host":
        path = item.config.rootpath / source
        if ":" not in os.fspath(source) or path.exists():
            merged["rootfs"] = str(path)
    return merged


_DEFAULTS = pytest.StashKey["SandboxSpec"]()


def defaults(config: pytest.Config) -> SandboxSpec:
    """What the options say."""
    if _DEFAULTS not in config.stash:
        from pytest_nsbox.model.spec import SandboxSpec

        config.stash[_DEFAULTS] = SandboxSpec.make(
            rootfs=options.value(config, "rootfs"), network=options.value(config, "network")
        )
    return config.stash[_DEFAULTS]


def spec_of(item: pytest.Item, base: SandboxSpec | Mapping[str, Any] | None = None) -> SandboxSpec:
    """The spec of a test. Raises SpecError."""
    spec = defaults(item.config)
    if isinstance(base, Mapping):
        spec = spec.replace(**base)
    elif base is not None:
        spec = base
    spec = spec.replace(**keywords(item))
    changed = item.ihook.pytest_nsbox_configure_spec(item=item, spec=spec)
    return changed if changed is not None else spec
