"""The attempts, each in namespaces and control groups of its own: nothing of them stays.

A probe returns a note, or raises what it failed with. It runs in a forked child.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from pytest_nsbox.kernel import capabilities, libc, link, namespaces, nft, seccomp, userns
from pytest_nsbox.kernel.mounts import Mount, Overlay
from pytest_nsbox.kernel.netlink import Netlink, Request
from pytest_nsbox.kernel.probe import Lacking, in_child

_SCRATCH = "/tmp"  # covered by a tmpfs, in a mount namespace of the probe's own
_PATIENCE = 1.0
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000


def enter(flags: int, *, user: bool | None = None) -> None:
    """Leave for new namespaces; below a user namespace where we are not root, or are told to."""
    if user if user is not None else not userns.is_administrator():
        uid, gid = os.geteuid(), os.getegid()
        libc.unshare(libc.CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            try:
                Path("/proc/self", name).write_text(text)
            except OSError as error:
                raise OSError(
                    error.errno, f"write {name}: {os.strerror(error.errno or 0)}"
                ) from error
    if flags:
        libc.unshare(flags)


def _private_mounts(*, user: bool | None = None) -> None:
    enter(libc.CLONE_NEWNS, user=user)
    Mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE).do()


# ---------------------------------------------------------------------- namespaces and mounts


def user_namespace() -> str | None:
    """With a netlink call in it: where AppArmor restricts them, unshare alone succeeds."""
    enter(libc.CLONE_NEWNET, user=True)
    Netlink().send([link.up(link.LOOPBACK, "lo")])
    return None


def other_namespaces() -> str | None:
    enter(
        libc.CLONE_NEWNS
        | libc.CLONE_NEWPID
        | libc.CLONE_NEWNET
        | libc.CLONE_NEWIPC
        | libc.CLONE_NEWUTS
        | libc.CLONE_NEWCGROUP
    )
    libc.sethostname("nsbox-doctor")
    return None


def time_namespace() -> str | None:
    enter(libc.CLONE_NEWTIME)
    namespaces.set_uptime(50 * 86400)
    in_child(_is_late)
    return None


def _is_late() -> None:
    if not 50 * 86400 <= time.clock_gettime(time.CLOCK_BOOTTIME) < 51 * 86400:
        raise Lacking("the clock of a time namespace stays where it was")


def proc_mount() -> str | None:
    _private_mounts()
    libc.unshare(libc.CLONE_NEWPID)
    in_child(Mount("proc", "/proc", "proc", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC).do)
    return None


def proc_mount_in_user_namespace() -> str | None:
    _private_mounts(user=True)
    libc.unshare(libc.CLONE_NEWPID)
    try:
        in_child(Mount("proc", "/proc", "proc", libc.MS_NOSUID | libc.MS_NODEV).do)
    except Lacking as error:
        raise Lacking(f"{error} (parts of /proc are masked here)") from None
    return None


def overlay_root() -> str | None:
    _private_mounts()
    _overlay(lower="/", user=not userns.is_administrator())
    return None


def overlay_directory() -> str | None:
    _private_mounts(user=True)
    _overlay(lower="/usr", user=True)
    return None


def _overlay(lower: str, user: bool) -> None:
    Mount("nsbox", _SCRATCH, "tmpfs", 0, "mode=755").do()
    for name in ("upper", "work", "merged"):
        os.mkdir(f"{_SCRATCH}/{name}")
    target = _SCRATCH + "/merged"
    Overlay((lower,), _SCRATCH + "/upper", _SCRATCH + "/work", target, user).do()
    if lower == "/usr" and not os.path.lexists(target + "/bin"):
        raise Lacking("an overlay on /usr shows no /usr/bin")
    Path(target, "nsbox-doctor").write_text("")
    if os.path.lexists(os.path.join(lower, "nsbox-doctor")):
        raise Lacking("what is written to an overlay lands below it")


# ---------------------------------------------------------------------- network


def veth_and_bridge() -> str | None:
    enter(libc.CLONE_NEWNET)
    peer = namespaces.open_namespace("net")
    libc.unshare(libc.CLONE_NEWNET)
    netlink = link.LinkSocket()
    netlink.send(
        [
            link.add_bridge(10, "br10", "02:00:00:00:00:01", 1500),
            link.add_veth(11, "veth11", peer="eth0", peer_index=2, peer_netns=peer, master=10),
            link.add_address(10, "br10", "198.51.100.1", 24),
        ]
    )
    return None


def masquerade() -> str | None:
    enter(libc.CLONE_NEWNET)
    rules = nft.Nft()
    rules.commit(
        nft.table("nsbox"),
        nft.chain("nsbox", "postrouting", "nat", "postrouting", nft.PRIORITY_SRCNAT),
        nft.rule("nsbox", "postrouting", nft.interface(nft.OIFNAME, "eth0"), nft.masquerade()),
    )
    return None


def netem() -> str | None:
    enter(libc.CLONE_NEWNET)
    # struct tcmsg (root, handle 1:), TCA_KIND, TCA_OPTIONS with a struct tc_netem_qopt
    payload = struct.pack("=B3xiIII", 0, link.LOOPBACK, 1 << 16, 0xFFFFFFFF, 0)
    payload += struct.pack("=HH8s", 10, 1, b"netem")
    payload += struct.pack("=HHIIIIII", 28, 2, 0, 1000, 0, 0, 0, 0)
    new_qdisc, create = 36, 0x600
    Netlink().send([Request("tc qdisc add dev lo root netem", new_qdisc, create, payload)])
    return None


def tun() -> str | None:
    enter(libc.CLONE_NEWNET)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    request = struct.pack("16sH22x", b"nsbox0", _IFF_TUN | _IFF_NO_PI)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, request)
    except OSError as error:
        raise OSError(error.errno, f"make a tun device: {os.strerror(error.errno or 0)}") from error
    return None


def pasta() -> str | None:
    program = _program("pasta")
    if userns.is_administrator():
        return "there; root does without it"
    _open_tun()
    done = subprocess.run(
        [program, "--config-net", "--quiet", "--", "cat", "/proc/net/route"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Lacking(f"pasta: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return None if "\t00000000\t" in done.stdout else "runs; the host has no default route to copy"


def slirp4netns() -> str | None:
    program = _program("slirp4netns")
    _open_tun()
    ready, tell = os.pipe()
    own_net, wait = os.pipe()
    inside = os.fork()
    if inside == 0:
        try:
            libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
            enter(libc.CLONE_NEWNET, user=True)
            os.write(wait, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(wait)
    if not os.read(own_net, 1):
        raise Lacking("a network namespace below a user namespace cannot be made")
    slirp = subprocess.Popen(
        [program, "--configure", f"--ready-fd={tell}", str(inside), "tap0"],
        pass_fds=[tell],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    os.close(tell)
    try:
        if not os.read(ready, 1):
            words = (slirp.communicate()[0].strip() or "failed").splitlines()
            raise Lacking(f"slirp4netns: {words[-1]}")
    finally:
        slirp.kill()
        os.kill(inside, signal.SIGKILL)
        slirp.wait()
        os.waitpid(inside, 0)
    return None


def _open_tun() -> None:
    """What a program that makes a tunnel waits for in vain where it cannot."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Lacking(f"/dev/net/tun: {error.strerror}") from error


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Lacking(f"{name} is not installed")
    return found


def forwarding_policy() -> str | None:
    """A base chain that drops cannot be overridden by an accept in another table. A session sends
    a packet to see what all rules come to; here the policies are looked at."""
    if not userns.is_administrator():
        return "a user does without it"
    dropped = [name for name, policy in nft.forward_chains() if policy == nft.DROP]
    if dropped:
        raise Lacking(f"chain {dropped[0]} drops what is forwarded (Docker sets it so)")
    legacy = shutil.which("iptables-legacy")
    if legacy:
        done = subprocess.run([legacy, "-S", "FORWARD"], capture_output=True, text=True)
        if "-P FORWARD DROP" in done.stdout:
            raise Lacking("iptables-legacy has the policy DROP on FORWARD (Docker sets it so)")
    return None


def subordinate_ids() -> str | None:
    """A range of ids, mapped by the setuid helpers as an ordinary user must."""
    if userns.is_administrator():
        return "root needs none"
    for helper in ("newuidmap", "newgidmap"):
        _program(helper)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            libc.unshare(libc.CLONE_NEWUSER)
            theirs.send(b"1")
            theirs.recv(1)
        finally:
            os._exit(0)
    theirs.close()
    try:
        if not ours.recv(1):
            raise Lacking("a user namespace cannot be made")
        for helper, file, own in (
            ("newuidmap", "/etc/subuid", os.getuid()),
            ("newgidmap", "/etc/subgid", os.getgid()),
        ):
            start, count = _range(file)
            command = [helper, str(child), "0", str(own), "1", "1", str(start), str(count)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise Lacking(done.stderr.strip() or f"{helper} failed")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


def _range(file: str) -> tuple[int, int]:
    import pwd

    with contextlib.suppress(OSError):
        names = {str(os.getuid()), pwd.getpwuid(os.getuid()).pw_name}
        for line in Path(file).read_text().splitlines():
            name, start, count = line.split(":")
            if name in names:
                return int(start), int(count)
    raise Lacking(f"{file} has no range for this user")


# ---------------------------------------------------------------------- the rest


def system_call_filter() -> str | None:
    program = seccomp.program(frozenset())
    if program is None:
        raise Lacking("the system calls of this machine are not known; there is no filter")
    capabilities.no_new_privs()
    seccomp.install(program)
    try:
        libc.sethostname("nsbox-doctor")
    except PermissionError:
        return None
    raise Lacking("a filter is taken and does not filter")


def disk_room() -> str | None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    while not cache.exists():
        cache = cache.parent
    if not os.access(cache, os.W_OK):
        raise Lacking(f"{cache} cannot be written; set XDG_CACHE_HOME")
    found = os.statvfs(cache)
    free = found.f_bavail * found.f_frsize
    text = f"{free >> 20} MiB free below {cache}"
    if free < 1 << 30:
        raise Lacking(text)
    return text


def inotify_room() -> str | None:
    """Instances are counted by user, containers' among them."""
    held: list[int] = []
    try:
        for _ in range(16):
            held.append(libc.inotify_init1())
    except OSError as error:
        raise OSError(error.errno, f"after {len(held)} instances: {error.strerror}") from error
    return None


def a_container() -> str | None:
    """Whether one can be had as a test has it, by the way that a test has it."""
    script = (
        "import pytest_nsbox, time\n"
        "with pytest_nsbox.Session() as s:\n"
        "    try:\n"
        "        with s.container() as c: c.run(['/bin/true'], check=True)\n"
        "    except pytest_nsbox.NsboxError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or done.stdout:
        raise Lacking((done.stdout.strip() or "failed").splitlines()[-1])
    return None
