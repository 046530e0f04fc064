"""An ordinary user of our own, without touching the machine: in a mount namespace that has another
/etc/passwd, a home, and the way to the interpreter and the checkout open to everybody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

_SCRIPT = r"""
set -e
cp /etc/passwd "$work/passwd"; echo "tester:x:1500:1500::$work/home:/bin/sh" >>"$work/passwd"
mount --bind "$work/passwd" /etc/passwd
for file in subuid subgid; do
    echo "$subordinate" >"$work/$file"; [ -e /etc/$file ] || touch /etc/$file
    mount --bind "$work/$file" /etc/$file
done
# the directories on the way may be root's alone: an open one stands in for the uppermost of them
for kept in "$checkout" "$prefix" "$python"; do
    top=/$(echo "$kept" | cut -d/ -f2)
    [ "$(stat -c %A "$top" | cut -c10)" = x ] || closed="$closed $top"
done
for top in $(printf '%s\n' $closed | sort -u); do
    mkdir -p "$work/real$top"; mount --rbind "$top" "$work/real$top"
    mount -t tmpfs -o mode=755 open "$top"
    for kept in "$checkout" "$prefix" "$python"; do
        case $kept in "$top"/*)
            [ -e "$kept" ] || { mkdir -p "$kept"; mount --rbind "$work/real$kept" "$kept"; }
        esac
    done
    umount -l "$work/real$top"
done
mkdir -p /dev/net; mount -t tmpfs -o mode=755 tun /dev/net
[ "$tun" = no ] || mknod -m 666 /dev/net/tun c 10 200
chown -R 1500:1500 "$work/home"
export HOME="$work/home" USER=tester PYTHONPATH="$checkout"
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
    for directory in (work, *work.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o555)
    variables = {
        **os.environ,
        **(env or {}),
        "work": str(work),
        "python": sys.prefix,
        "prefix": sys.base_prefix,
        "checkout": str(REPOSITORY),
        "subordinate": "tester:100000:65536" if subordinate else "",
        "tun": "yes" if tun else "no",
        "closed": "",
    }
    return subprocess.run(
        [*enter, "unshare", "-m", "sh", "-c", _SCRIPT, "sh", *command],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
