"""Files and trees between the host and a container.

Each side names a place; the launcher, which may read and write both, does the copying. What a
path of the container means is found out by its init, inside.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nsbox.session.container import Container

Path = str | os.PathLike[str]
Open = Callable[[str, bool], int]  # a directory, made where it does not exist if so asked
_DIRECTORY = os.O_PATH | os.O_DIRECTORY


def copy_in(container: Container, src: Path, dst: Path, *, archive: bool) -> list[str]:
    """From the host into a container; returns what has been left out."""
    target = os.path.join("/", os.fspath(dst))
    return _copy(container, (os.fspath(src), _on_host), (target, _inside(container)), "in", archive)


def copy_out(container: Container, src: Path, dst: Path, *, archive: bool) -> list[str]:
    """From a container to the host; returns what has been left out."""
    source = os.path.join("/", os.fspath(src))
    return _copy(
        container, (source, _inside(container)), (os.fspath(dst), _on_host), "out", archive
    )


def _on_host(path: str, parents: bool) -> int:
    if parents:
        os.makedirs(path, exist_ok=True)
    return os.open(path, _DIRECTORY | os.O_CLOEXEC)


def _inside(container: Container) -> Open:
    def open_inside(path: str, parents: bool) -> int:
        # what is made are the parents of what is opened
        path = os.path.join(path, "") if parents else path
        message = {"op": "open", "path": path, "flags": _DIRECTORY, "parents": parents}
        (fd,) = container.request_init(message)
        return fd

    return open_inside


def _copy(
    container: Container,
    source: tuple[str, Open],
    target: tuple[str, Open],
    direction: str,
    archive: bool,
) -> list[str]:
    path, open_source = source
    with _opened(path, open_source) as (there, name):
        label = "" if _is_content(path) else os.path.basename(path.rstrip("/"))
        with _target(*target, label, lambda: _is_directory(there, name)) as (here, new_name):
            reply, _ = container.session.request(
                "copy",
                [there, here],
                id=container.id,
                name=name,
                new_name=new_name,
                path=path,
                direction=direction,
                archive=archive,
            )
    return list(reply["left_out"])


def _is_content(path: str) -> bool:
    """Whether a source stands for what is in it, as `docker cp` has it."""
    return path.rstrip("/").rpartition("/")[2] in ("", ".", "..")


def _split(path: str) -> tuple[str, str]:
    """A directory and a name in it. One that ends in a slash or a dot is itself, whatever link
    it may be; any other is what has that name, and if it is a link, the link."""
    if path.endswith("/") or _is_content(path):
        return path or ".", "."
    head, tail = os.path.split(path)
    return head or ".", tail


@contextlib.contextmanager
def _opened(path: str, open_directory: Open) -> Iterator[tuple[int, str]]:
    directory, name = _split(path)
    try:
        fd = open_directory(directory, False)
    except OSError as error:
        error.filename = path
        raise
    try:
        yield fd, name
    finally:
        os.close(fd)


@contextlib.contextmanager
def _target(
    path: str, open_target: Open, label: str, is_tree: Callable[[], bool]
) -> Iterator[tuple[int, str]]:
    """Where it will be: below `path` if that is a directory, else as `path`, whose missing
    parents are made. Without a label it is what is in the source that is copied."""
    try:
        fd, name = open_target(path, False), label or "."
    except (FileNotFoundError, NotADirectoryError):
        if not label or (path.endswith("/") and not is_tree()):
            fd, name = open_target(path, True), label or "."
        else:
            head, name = os.path.split(path.rstrip("/"))
            fd = open_target(head or ".", True)
    try:
        yield fd, name
    finally:
        os.close(fd)


def _is_directory(directory: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
