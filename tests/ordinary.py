"""An ordinary user of our own, without touching the machine: in a mount namespace that has another
/etc/passwd, a home, and the way to the interpreter and the checkout open to everybody, wherever
they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

_SCRIPT = r"""
set -e
cp /etc/passwd "$work/passwd"; echo "tester:x:1500:1500::$work/home:/bin/sh" >>"$work/passwd"
mount --bind "$work/passwd" /etc/passwd
for file in subuid subgid; do
    echo "$subordinate" >"$work/$file"; [ -e /etc/$file ] || touch /etc/$file
    mount --bind "$work/$file" /etc/$file
done
show() { # a directory as it was before it was covered, itself open
    mkdir -p "$1"
    for entry in "/proc/self/fd/3/$2"/* "/proc/self/fd/3/$2"/.[!.]*; do
        target=$1/${entry##*/}
        if [ -d "$entry" ]; then mkdir "$target"
        elif [ -f "$entry" ]; then : >"$target"
        else continue
        fi
        # not canonical: what the descriptor is open on has no path any more
        mount --no-canonicalize --rbind "$entry" "$target"
    done
}
# the directories on the way may be root's alone: an open one stands in for the uppermost of them
printf '%s\n' "$closed" | while read -r top; do
    [ -n "$top" ] || continue
    exec 3<"$top"
    mount -t tmpfs -o mode=755 open "$top"
    printf '%s\n' "$kept" | while read -r path; do
        case $path in
            "$top") show "$path" "" ;;
            "$top"/*) [ -d "$path" ] || show "$path" "${path#"$top"/}" ;;
        esac
    done
    exec 3<&-
done
mkdir -p /dev/net; mount -t tmpfs -o mode=755 tun /dev/net
[ "$tun" = no ] || mknod -m 666 /dev/net/tun c 10 200
chown -R 1500:1500 "$work/home"
export HOME="$work/home" USER=tester PYTHONPATH="$checkout" PYTEST_DEBUG_TEMPROOT="$work/home"
unset XDG_CACHE_HOME XDG_RUNTIME_DIR
cd "$work/home"
exec setpriv --reuid=1500 --regid=1500 --clear-groups --inh-caps=-all "$@"
"""


def run_as_ordinary_user(
    work: Path,
    *command: str,
    subordinate: bool = True,
    tun: bool = True,
    enter: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command as an ordinary user, whose home is `work`/home."""
    (work / "home").mkdir(exist_ok=True)
    kept = sorted({REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), work.resolve()})
    variables = {
        **os.environ,
        **(env or {}),
        "work": str(work.resolve()),
        "checkout": str(REPOSITORY),
        "kept": "\n".join(map(str, kept)),
        "closed": "\n".join(sorted({str(top) for path in kept for top in _closed(path)})),
        "subordinate": "tester:100000:65536" if subordinate else "",
        "tun": "yes" if tun else "no",
    }
    return subprocess.run(
        [*enter, "unshare", "-m", "sh", "-c", _SCRIPT, "sh", *command],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _closed(path: Path) -> list[Path]:
    """The uppermost directory on the way to `path`, itself included, that others may not enter
    and read, if any."""
    way = [*reversed(path.parents), path]
    return [each for each in way if each.stat().st_mode & 0o5 != 0o5][:1]
