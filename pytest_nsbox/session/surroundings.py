"""What a command, or a fork of this process, finds around it in a container: its environment, its
directory, who it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_nsbox import wire
from pytest_nsbox.model.rootfs import PATH

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container


def of_a_command(
    container: Container,
    env: Mapping[str, str] | None,
    cwd: str | os.PathLike[str] | None,
    user: str | int | None,
) -> wire.Message:
    """As init is told them; None is what commands have unless told otherwise."""
    spec = container.spec
    if user is None:
        user = spec.user if spec.user is not None else container.rootfs.user
    return {
        "env": dict(_environment(container) if env is None else env),
        "cwd": working_directory(container) if cwd is None else os.fspath(cwd),
        "cwd_optional": cwd is None and spec.cwd is None,
        "user": None if user is None else str(user),
        "set_home": env is None and "HOME" not in spec.env,
    }


def _environment(container: Container) -> dict[str, str]:
    if container.rootfs.is_host:
        env = dict(os.environ)
    else:
        env = {"PATH": PATH, "HOME": "/root", **container.rootfs.env}
    env["HOSTNAME"] = container.hostname
    env.update(container.spec.env)
    return env


def working_directory(container: Container) -> str | None:
    """Where a command or a fork begins."""
    if container.spec.cwd is not None:
        return container.spec.cwd
    if not container.rootfs.is_host and container.brought is None:
        return container.rootfs.cwd or "/"
    try:
        return os.getcwd()
    except FileNotFoundError:  # it has been removed, so it is not inside either
        return "/"


def added_for_a_fork(container: Container) -> dict[str, str]:
    """What the container adds to the environment of a fork of this process: the image's variables,
    and on the PATH what of this process's own is there, too."""
    rootfs, brought = container.rootfs, container.brought
    if brought is None:
        return dict(container.spec.env)
    own = filter(brought.has, os.environ.get("PATH", "").split(":"))
    paths = {"PATH": ":".join([*own, rootfs.env.get("PATH", PATH)])}
    return {**rootfs.env, **paths, **container.spec.env}
