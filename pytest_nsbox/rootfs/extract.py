"""Runs in a child of its own, whose root directory is the new layer: writes a tar into it.

The archive is untrusted. Names are resolved by the kernel below this root, so a symbolic link
leads nowhere else, and what is written is always a new file: nothing that exists is opened.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from tarfile import TarFile, TarInfo

from pytest_nsbox.rootfs.tar import members, parts_of

WHITEOUT = b".wh."
META = b".wh..wh."  # the opaque mark, and what aufs kept for itself
OPAQUE = b".wh..wh..opq"
XATTR = "SCHILY.xattr."
DEEPEST = 200  # what shutil.rmtree, which recurses and holds a descriptor per level, can remove


class Extraction:
    """One tar into `/`; with `whiteouts`, as a layer of an image (OCI image spec, layer.md)."""

    def __init__(self, *, whiteouts: bool) -> None:
        self.entry: str | None = None  # the last whose header was read, for errors
        self._whiteouts = whiteouts
        self._hidden: list[list[bytes]] = []
        self._opaque: list[list[bytes]] = []
        self._directories: dict[bytes, bytes] = {}  # as named -> with symbolic links resolved
        self._mtimes: dict[bytes, float] = {}  # of directories: writing into them changes it

    def run(self, archive: TarFile) -> None:
        for member in members(archive):
            self.entry = member.name
            self._member(archive, member)
        self._apply_whiteouts()
        for path, mtime in self._mtimes.items():
            os.utime(path, (mtime, mtime))

    def _member(self, archive: TarFile, member: TarInfo) -> None:
        parts = parts_of(member.name)
        if not parts:
            if member.isdir():
                self._attributes(b"/", member)
            return
        if self._whiteouts and self._is_whiteout(parts):
            return
        if member.isdev() and not member.isfifo():
            # /dev is made for each container, and an overlay would take device 0/0 for a whiteout.
            return
        path = os.path.join(self._directory(parts[:-1]), parts[-1])
        if member.islnk():
            self._link(parts_of(member.linkname), path)
            return
        if member.isdir():
            if not _is_directory(path):
                self._clear(path)
                os.mkdir(path)
        else:
            self._clear(path)
            if member.issym():
                os.symlink(member.linkname.encode("utf-8", "surrogateescape"), path)
            elif member.isfifo():
                os.mkfifo(path)
            else:  # POSIX: a type that one does not know is a regular file
                archive.makefile(member, path)
        self._attributes(path, member)

    def _directory(self, parts: list[bytes]) -> bytes:
        """The directory of this name, made where the archive did not care to."""
        name = b"/".join(parts)
        if (known := self._directories.get(name)) is not None:
            return known
        real = os.path.realpath(b"/" + name)
        if real.count(b"/") > DEEPEST:
            raise ValueError(f"more than {DEEPEST} directories deep")
        os.makedirs(real, exist_ok=True)
        self._directories[name] = real
        return real

    def _clear(self, path: bytes) -> None:
        """Of two entries with one name the later wins, whatever the two are."""
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            shutil.rmtree(path)
            below = path + b"/"
            for gone in [p for p in self._mtimes if p == path or p.startswith(below)]:
                del self._mtimes[gone]
        else:
            os.unlink(path)
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            self._directories.clear()

    def _link(self, target: list[bytes], path: bytes) -> None:
        existing = os.path.join(os.path.realpath(b"/" + b"/".join(target[:-1])), *target[-1:])
        with suppress(FileNotFoundError):
            # GNU tar writes a link to itself for a file that it was told to store twice.
            if os.path.samestat(os.lstat(existing), os.lstat(path)):
                return
        self._clear(path)
        os.link(existing, path, follow_symlinks=False)

    def _attributes(self, path: bytes, member: TarInfo) -> None:
        # In this order: chown clears the setuid bits and the file capabilities.
        _set_owner(path, member.uid, member.gid)
        if not member.issym():
            os.chmod(path, stat.S_IMODE(member.mode))
        for key, value in member.pax_headers.items():
            if key.startswith(XATTR):
                _set_xattr(path, key.removeprefix(XATTR), value)
        if member.isdir():
            self._mtimes[path] = member.mtime
        else:
            os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)

    def _is_whiteout(self, parts: list[bytes]) -> bool:
        *parents, name = parts
        if name == OPAQUE:
            self._opaque.append(parents)
        elif any(part.startswith(META) for part in parts):
            pass
        elif name.startswith(WHITEOUT):
            hidden = name.removeprefix(WHITEOUT)
            if hidden in (b"", b".", b".."):
                raise ValueError("a whiteout that names nothing")
            self._hidden.append([*parents, hidden])
        else:
            return False
        return True

    def _apply_whiteouts(self) -> None:
        """Last, since they hide what is in the layers below, never what this one brings.

        A file that this layer has in the place of what is hidden, or of its directory, hides it.
        """
        for parents in self._opaque:
            with suppress(FileExistsError, NotADirectoryError):
                _set_opaque(self._directory(parents))
        for parts in sorted(self._hidden, key=len):
            with suppress(FileExistsError, NotADirectoryError):
                path = os.path.join(self._directory(parts[:-1]), parts[-1])
                if _is_directory(path):
                    _set_opaque(path)
                else:
                    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def _is_directory(path: bytes) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _set_owner(path: bytes, uid: int, gid: int) -> None:
    try:
        os.lchown(path, uid, gid)
    except OSError as error:
        # an id that the user namespace does not map: the file is root's, as is all that is written
        if error.errno != errno.EINVAL:
            raise


def _set_opaque(path: bytes) -> None:
    """By both names: an overlay in a user namespace reads the user's (`userxattr`), which says
    nothing to others; only the host's root may write the other."""
    os.setxattr(path, "user.overlay.opaque", b"y")
    with suppress(PermissionError):
        os.setxattr(path, "trusted.overlay.opaque", b"y")


def _set_xattr(path: bytes, name: str, value: str) -> None:
    # What steers the overlay or a security module of the host is not the archive's to say.
    if name.startswith(("trusted.", "user.overlay.")):
        return
    if name.startswith("security.") and name != "security.capability":
        return
    try:
        os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
    except OSError as error:
        # Not every filesystem has them all, and a symbolic link has none of the user's.
        if error.errno not in (errno.ENOTSUP, errno.EPERM):
            raise
