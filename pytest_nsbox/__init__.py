"""pytest-nsbox: a Linux container of its own for every test."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_nsbox.errors import (
        CallError,
        CommandError,
        ContainerDied,
        ContainerTimeout,
        NsboxError,
        OutOfMemory,
        RootfsError,
        SetupError,
        SpecError,
        TeardownError,
        UnsupportedError,
        WaitError,
    )
    from pytest_nsbox.model.limits import Stats
    from pytest_nsbox.model.results import Change, Result
    from pytest_nsbox.model.rootfs import Rootfs
    from pytest_nsbox.model.spec import Bind, SandboxSpec, Tmpfs
    from pytest_nsbox.session.container import Container
    from pytest_nsbox.session.network import Network
    from pytest_nsbox.session.process import Process
    from pytest_nsbox.session.session import Session

_WHERE = {
    "Bind": "model.spec",
    "CallError": "errors",
    "Change": "model.results",
    "CommandError": "errors",
    "Container": "session.container",
    "ContainerDied": "errors",
    "ContainerTimeout": "errors",
    "Network": "session.network",
    "NsboxError": "errors",
    "OutOfMemory": "errors",
    "Process": "session.process",
    "Result": "model.results",
    "Rootfs": "model.rootfs",
    "RootfsError": "errors",
    "SandboxSpec": "model.spec",
    "Session": "session.session",
    "SetupError": "errors",
    "SpecError": "errors",
    "Stats": "model.limits",
    "TeardownError": "errors",
    "Tmpfs": "model.spec",
    "UnsupportedError": "errors",
    "WaitError": "errors",
}

__all__ = [
    "Bind",
    "CallError",
    "Change",
    "CommandError",
    "Container",
    "ContainerDied",
    "ContainerTimeout",
    "Network",
    "NsboxError",
    "OutOfMemory",
    "Process",
    "Result",
    "Rootfs",
    "RootfsError",
    "SandboxSpec",
    "Session",
    "SetupError",
    "SpecError",
    "Stats",
    "TeardownError",
    "Tmpfs",
    "UnsupportedError",
    "WaitError",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: the plugin alone must cost nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
