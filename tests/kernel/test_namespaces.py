"""A process that visits another's namespaces comes back to where it was, or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

# in a root of its own, as chroot(1) gives it, with another process in namespaces made from there
AT_HOME = """
    import os, socket, sys, tempfile
    from pytest_nsbox import wire
    from pytest_nsbox.kernel import libc, namespaces

    libc.unshare(libc.CLONE_NEWNS | libc.CLONE_NEWUTS)
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
    libc.mount("tmpfs", sys.argv[1], "tmpfs")
    os.chroot(sys.argv[1])
    os.chdir("/")
    os.mkdir("/proc")
    libc.mount("proc", "/proc", "proc")
    os.mkdir("/inner")
    os.chdir("/inner")
    libc.sethostname("home")
    home = namespaces.Home(["mnt", "uts"])
    ours, theirs = wire.pair()
    if os.fork() == 0:
        ours.close()
        libc.unshare(libc.CLONE_NEWNS | libc.CLONE_NEWUTS)
        libc.mount("tmpfs", "/inner", "tmpfs")
        open("/inner/theirs", "w").close()
        fds = [namespaces.open_namespace(kind) for kind in ("mnt", "uts")]
        wire.send(theirs, {}, [*fds, os.open("/", os.O_PATH)])
        wire.receive(theirs)
        os._exit(0)
    theirs.close()
    _, (mnt, uts, root) = wire.receive(ours)
    away = home.away({"mnt": mnt, "uts": uts}, root)
"""


def run(script: str, directory: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AT_HOME) + textwrap.dedent(script), str(directory)],
        capture_output=True,
        text=True,
    )


def test_a_visitor_comes_back_to_its_own_root_and_directory(tmp_path: object) -> None:
    done = run(
        """
        with away:
            print(os.listdir("/inner"), sorted(os.listdir("/")))
            libc.sethostname("away")
        print(os.listdir("/inner"), os.listdir("."), os.getcwd(), socket.gethostname())
        """,
        tmp_path,
    )
    assert done.stdout == "['theirs'] ['inner', 'proc']\n[] [] /inner home\n", done.stderr


def test_a_visitor_that_cannot_come_back_ends(tmp_path: object) -> None:
    done = run(
        """
        def refuse(fd, flags):
            raise OSError(12, "no memory")

        with away:
            libc.setns = refuse
        print("astray")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
