"""Containers of Docker and podman themselves, to run pytest in; `ci/engines` starts them.

The image is made of this machine's own packages. The checkout, Python and the tests are mounted
from here, as a runner mounts what it has checked out.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tests.ordinary import REPOSITORY, run_as_ordinary_user

Environment = Callable[..., subprocess.CompletedProcess[str]]

_PATIENCE = 300  # seconds
_IMAGE = "machine"
_PACKAGES = (
    "python3 mount iproute2 iputils-ping nftables curl passt slirp4netns uidmap busybox-static"
)
_LEFT_OUT = ("/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/")
_MERGED = ("/bin", "/sbin", "/lib", "/lib64")  # into /usr
_MADE = (  # by what the packages do when they are installed
    *("/tmp", "/var/tmp", "/root", "/srv"),
    *("/etc/passwd", "/etc/group", "/etc/ld.so.cache", "/etc/alternatives"),
)


def docker(*options: str) -> Environment:
    """`docker run` with options: a command in it, in the current directory."""
    return _started("docker", *options)


def podman(*options: str) -> Environment:
    """The same with `podman run`."""
    return _started("podman", *options)


def _started(engine: str, *options: str) -> Environment:
    def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
        _import(engine)
        group = f"--cgroup-parent={os.environ['ENGINES_CGROUP']}"
        return subprocess.run(
            [engine, "run", "--rm", group, *options, *_from_here(place), _IMAGE, *command],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )

    return run


def rootless_podman(*options: str) -> Environment:
    """The same by an ordinary user, who has an image store of its own."""

    def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
        image = place / "image.tar"
        with image.open("wb") as file:
            _pack(file)
        subprocess.run(["chmod", "-R", "a+rX", place], check=True)
        start = ["podman", "run", "--rm", *options, *_from_here(place), _IMAGE, *command]
        script = f'podman import --quiet "$1" {_IMAGE} >/dev/null; shift; exec "$@"'
        # as after a login; without it podman leaves directories in /tmp
        script = f'export XDG_RUNTIME_DIR="/run/user/$(id -u)"; {script}'
        # Docker's and root's own are out of reach
        env = {"CONTAINERS_STORAGE_CONF": "/dev/null"}
        return run_as_ordinary_user(place, "sh", "-ec", script, "sh", str(image), *start, env=env)

    return run


def _from_here(place: Path) -> list[str]:
    kept = sorted({str(REPOSITORY), sys.prefix, sys.base_prefix, str(place.resolve())})
    return [
        *(f"--volume={path}:{path}" for path in kept),
        f"--workdir={os.getcwd()}",
        *(f"--env={name}" for name in os.environ if name.startswith("PYTEST_")),
    ]


@functools.cache
def _import(engine: str) -> None:
    command = [engine, "import", "-", _IMAGE]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=nowhere) as importing:
        assert importing.stdin is not None
        _pack(importing.stdin)
    assert importing.returncode == 0


def _pack(file: IO[bytes]) -> None:
    tar = ["tar", "--create", "--no-recursion", "--absolute-names", "--files-from=-"]
    subprocess.run(tar, input="\n".join(_paths()).encode(), stdout=file, check=True)


def _paths() -> list[str]:
    """What is in the packages, and in those that they need, as it is on this machine."""
    kinds = "recommends suggests conflicts breaks replaces enhances".split()
    recurse = ["--recurse", "--installed", *(f"--no-{kind}" for kind in kinds)]
    needed = _lines("apt-cache", "depends", *recurse, *_PACKAGES.split())
    installed = dict(
        line.split()[:2]
        for line in _lines(
            "dpkg-query", "-W", "-f", "${Package} ${Essential} ${db:Status-Abbrev}\n"
        )
        if line.endswith("ii ")
    )
    names = {name for name in needed if name in installed}
    names |= {name for name, essential in installed.items() if essential == "yes"}
    found = {*_MADE, *_MERGED}
    for path in _lines("dpkg", "-L", *sorted(names)):
        if path.startswith("/") and path != "/." and not path.startswith(_LEFT_OUT):
            merged = path.startswith(tuple(f"{top}/" for top in _MERGED))
            found.add(f"/usr{path}" if merged else path)
    return sorted(filter(os.path.lexists, found))


def _lines(*command: str) -> list[str]:
    return subprocess.check_output(command, text=True).splitlines()


_SYSTEM = ["--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN"]
_UNMASKED = ["--security-opt=unmask=ALL", "--security-opt=seccomp=unconfined"]

ENVIRONMENTS: dict[str, Environment] = {
    "docker run --privileged": docker("--privileged"),
    "docker run --privileged -v /root/.cache": docker("--privileged", "--volume=/root/.cache"),
    "docker run --cap-add SYS_ADMIN --cap-add NET_ADMIN": docker(*_SYSTEM),
    "the same, --cap-add SYS_TIME -v /sys/fs/cgroup:/sys/fs/cgroup": docker(
        *_SYSTEM, "--cap-add=SYS_TIME", "--volume=/sys/fs/cgroup:/sys/fs/cgroup"
    ),
    "docker run --security-opt seccomp=, apparmor=, systempaths=unconfined": docker(
        *(f"--security-opt={what}=unconfined" for what in ("seccomp", "apparmor", "systempaths"))
    ),
    "docker run": docker(),
    "podman run --privileged": podman("--privileged"),
    "podman run --cap-add SYS_ADMIN --cap-add NET_ADMIN": podman(*_SYSTEM),
    "podman run --security-opt unmask=ALL --security-opt seccomp=unconfined": podman(*_UNMASKED),
    "podman run --security-opt unmask=ALL": podman(*_UNMASKED[:1]),
    "podman run": podman(),
    "podman run --privileged, of an ordinary user": rootless_podman("--privileged"),
    "podman run, unmask and seccomp as above, of an ordinary user": rootless_podman(*_UNMASKED),
    "podman run, of an ordinary user": rootless_podman(),
}
"""Where pytest runs, by what a user writes."""
