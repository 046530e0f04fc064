"""The steps to a file tree, where one of them fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PIVOT = """
import errno, sys
from pytest_nsbox.kernel import libc, mounts

def refuse(target, flags=0):
    raise PermissionError(errno.EPERM, "Operation not permitted", target)

libc.umount2 = refuse
libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
libc.mount("new", sys.argv[1], "tmpfs")
try:
    mounts.PivotRoot(sys.argv[1]).do()
except OSError as error:
    print(error)
"""


def test_what_is_refused_after_the_root_has_been_changed_is_no_refusal_to_change_it(
    tmp_path: Path,
) -> None:
    python = [sys.executable, "-c", PIVOT, str(tmp_path)]
    said = subprocess.check_output(["unshare", "--mount", *python], text=True)
    assert said == "[Errno 1] Operation not permitted: '.'\n"
