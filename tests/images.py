"""Root filesystems and images from Debian's busybox, packed by umoci and skopeo."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest


class Images:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    @functools.cached_property
    def tree(self) -> Path:
        """A directory with busybox and all its commands."""
        root = self.directory / "tree"
        for name in ("bin", "etc", "root", "usr/share", "var/www"):
            (root / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin/busybox")
        names = subprocess.check_output(["/bin/busybox", "--list"], text=True).split()
        for name in names:
            if name != "busybox":
                os.symlink("busybox", root / "bin" / name)
        (root / "etc/passwd").write_text(
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:/bin/sh\n"
        )
        (root / "etc/group").write_text("root:x:0:\nweb:x:33:\nextra:x:44:web\n")
        (root / "etc/release").write_text("from the tree\n")
        return root

    def copy_of_tree(self, name: str) -> Path:
        """Another directory like it, for a test to change."""
        return Path(shutil.copytree(self.tree, self.directory / name, symlinks=True))

    @functools.cached_property
    def glibc_tree(self) -> Path:
        """The same with the C library of this machine, and no other library."""
        root = self.copy_of_tree("glibc")
        for name in ("lib", "lib64"):
            (root / "usr" / name).mkdir()
            (root / name).symlink_to(f"usr/{name}")
        files = subprocess.check_output(["dpkg", "-L", "libc6"], text=True).splitlines()
        for path in filter(os.path.isfile, files):
            if path.startswith(("/lib", "/usr/lib")):
                (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, root / path[1:], follow_symlinks=False)
        return root

    @functools.cached_property
    def musl_tree(self) -> Path:
        """One whose C library is another: musl, with a program that is linked to it."""
        root = self.copy_of_tree("musl")
        source = self.directory / "hello.c"
        source.write_text('#include <stdio.h>\nint main(void) { puts("of the image"); }\n')
        self._run("musl-gcc", "-o", root / "bin/hello", source)
        loader = Path("/lib/ld-musl-x86_64.so.1")
        (root / "lib").mkdir()
        shutil.copy(loader.resolve(), root / "lib" / loader.name)
        return root

    @functools.cached_property
    def tarball(self) -> Path:
        path = self.directory / "root.tar.gz"
        self._run("tar", "-C", self.tree, "-czf", path, ".")
        return path

    @functools.cached_property
    def oci_layout(self) -> Path:
        """Three layers: the tree; a file changed and one added; one of both removed again."""
        layout, bundle = self.directory / "layout", self.directory / "bundle"
        image = f"{layout}:app"
        self._run("umoci", "init", "--layout", layout)
        self._run("umoci", "new", "--image", image)
        self._run("umoci", "unpack", "--image", image, bundle)
        root = bundle / "rootfs"
        shutil.copytree(self.tree, root, symlinks=True, dirs_exist_ok=True)
        self._run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
        (root / "etc/release").write_text("from the second layer\n")
        (root / "var/www/index.html").write_text("hello from the image\n")
        (root / "var/www/draft.html").write_text("not for publication\n")
        self._run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
        (root / "var/www/draft.html").unlink()
        # or this layer would be the same in every run, and found in a cache
        (root / f"var/www/{uuid.uuid4()}").touch()
        self._run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
        for path in (root / "var/www").glob("*-*"):
            path.unlink()
        self._run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
        self._run(
            "umoci", "config", "--image", image,
            "--config.env", "GREETING=hello", "--config.workingdir", "/var/www",
        )  # fmt: skip
        return layout

    def layered(self, count: int) -> Path:
        """A layout with an image `app` of so many layers: the tree, then a file in each."""
        layout, file = self.directory / f"layers{count}", self.directory / "file"
        image = f"{layout}:app"
        self._run("umoci", "init", "--layout", layout)
        self._run("umoci", "new", "--image", image)
        self._run("umoci", "insert", "--image", image, self.tree, "/")
        for number in range(1, count):
            file.write_text(f"{number}\n")
            self._run("umoci", "insert", "--image", image, file, f"/var/www/{number}")
        return layout

    @functools.cached_property
    def docker_archive(self) -> Path:
        """What `docker save` writes."""
        path = self.directory / "image.tar"
        self._run(
            "skopeo",
            "copy",
            "--quiet",
            f"oci:{self.oci_layout}:app",
            f"docker-archive:{path}:app:1",
        )
        return path

    @functools.cached_property
    def debian_tree(self) -> Path:
        """The distribution that this machine runs, as debootstrap makes it."""
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        mirrors = subprocess.check_output(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {release}"],
            text=True,
        )
        tree = self.directory / "debian"
        options = ["--variant=minbase", "--include=python3-minimal"]
        self._run("debootstrap", *options, release, tree, mirrors.split()[0])
        return tree

    @functools.cached_property
    def debian_docker_archive(self) -> Path:
        """The same, as `docker save` would write it."""
        layout, path = self.directory / "debian-layout", self.directory / "debian.tar"
        self._run("umoci", "init", "--layout", layout)
        self._run("umoci", "new", "--image", f"{layout}:debian")
        self._run("umoci", "insert", "--image", f"{layout}:debian", self.debian_tree, "/")
        self._run("skopeo", "copy", "--quiet", f"oci:{layout}:debian", f"docker-archive:{path}:d:1")
        return path

    @functools.cached_property
    def oci_archive(self) -> Path:
        path = self.directory / "image-oci.tar"
        self._run("skopeo", "copy", "--quiet", f"oci:{self.oci_layout}:app", f"oci-archive:{path}")
        return path


REGISTRY = "docker://registry.example/app:1"


def as_a_registry(
    layout: Path, path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "app"
) -> Path:
    """Have skopeo take an image of a layout for that of REGISTRY; returns where it is
    written what it is asked for, and in which network."""
    log, program, real = path / "log", path / "skopeo", shutil.which("skopeo")
    path.mkdir(mode=0o755)
    log.touch()
    log.chmod(0o666)
    own = f"oci:{layout}:{name}"
    program.write_text(
        f"""#!/bin/bash
        echo "$1 $(readlink /proc/self/ns/net)" >>{log}
        for word; do
            if [ "$word" = {REGISTRY} ]; then word={own}; fi
            words+=("$word")
        done
        exec {real} "${{words[@]}}"
        """
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    return log
