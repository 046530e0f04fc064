"""What is mounted, and that it has changed."""

from __future__ import annotations

import subprocess
import sys

WATCH = """
import os, resource, subprocess
from pytest_nsbox.kernel.mountinfo import MountWatch

most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held = [os.dup(2) for _ in range(1024)]
watch = MountWatch()
before = watch.now()
assert watch.now() is before
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/srv"], check=True)
after = watch.now()
assert {mount.path for mount in after} - {mount.path for mount in before} == {"/srv"}
assert watch.now() is after
"""


def test_a_mount_is_noticed_by_who_holds_a_thousand_descriptors() -> None:
    command = ["unshare", "-m", sys.executable, "-c", WATCH]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
