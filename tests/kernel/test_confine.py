"""What a confined process can and cannot do, asked of the kernel in forked children."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_nsbox.errors import SpecError
from pytest_nsbox.kernel import capabilities, libc, seccomp
from pytest_nsbox.model.capabilities import ALL, DEFAULT, NUMBERS, mask, resolve

X86 = platform.machine() == "x86_64"
NONE: frozenset[str] = frozenset()
POINTER = ctypes.c_void_p(-1 & 0xFFFFFFFFFFFFF000)  # readable by nobody

# name: (x86_64, aarch64)
CALLS = {
    "bpf": (321, 280),
    "clone": (56, 220),
    "clone3": (435, 435),
    "finit_module": (313, 273),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "umount2": (166, 39),
    "unshare": (272, 97),
}

c_libc = ctypes.CDLL(None, use_errno=True)
c_libc.syscall.restype = ctypes.c_long


def syscall(name: str | int, *arguments: Any) -> str:
    """The name of the error, or "" where there was none."""
    number = CALLS[name][0 if X86 else 1] if isinstance(name, str) else name
    words = [
        word if isinstance(word, ctypes.c_void_p) else ctypes.c_ulong(word) for word in arguments
    ]
    if c_libc.syscall(ctypes.c_long(number), *words) < 0:
        return errno.errorcode[ctypes.get_errno()]
    return ""


def in_child(body: Callable[[], Any]) -> Any:
    """What `body` returns in a forked child, by way of JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = json.dumps({"value": body()})
        except BaseException:
            text = json.dumps({"error": traceback.format_exc()})
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    assert text, f"the child ended with {os.waitstatus_to_exitcode(status)} and said nothing"
    result = json.loads(text)
    assert "error" not in result, result["error"]
    return result["value"]


def filtered(body: Callable[[], Any], keep: frozenset[str] = NONE) -> Any:
    """What `body` returns under the filter alone: what is refused then, the filter refused."""

    def confined() -> Any:
        program = seccomp.program(keep)
        assert program is not None
        capabilities.no_new_privs()
        seccomp.install(program)
        return body()

    return in_child(confined)


def status() -> dict[str, int]:
    """The masks of the calling process, its NoNewPrivs and its Seccomp."""
    text = Path("/proc/self/status").read_text()
    return {
        name: int(value, 16)
        for name, value in re.findall(r"^(Cap\w+|NoNewPrivs|Seccomp):\s*(\w+)$", text, re.M)
    }


OWN = status()


def test_the_default_is_what_docker_keeps_and_net_admin() -> None:
    assert mask(DEFAULT - {"NET_ADMIN"}) == 0xA80425FB  # as `docker run` shows it
    assert mask(DEFAULT) == 0xA80435FB
    assert resolve([]) == DEFAULT


def test_changes_apply_in_order_to_the_default() -> None:
    assert resolve(["+SYS_ADMIN", "-NET_RAW"]) == DEFAULT - {"NET_RAW"} | {"SYS_ADMIN"}
    assert resolve(["-ALL", "sys_ptrace", "cap_kill", "+CAP_BPF"]) == {"SYS_PTRACE", "KILL", "BPF"}
    assert resolve(["+ALL", "-cap_bpf"]) == ALL - {"BPF"}
    assert resolve(["+KILL", "-KILL"]) == DEFAULT - {"KILL"}
    assert len(ALL) == 41
    assert NUMBERS["CHECKPOINT_RESTORE"] == 40


def test_an_unknown_capability_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(SpecError, match=r"'\+SYS_ADMN' .* did you mean SYS_ADMIN.*WAKE_ALARM"):
        resolve(["+SYS_ADMN"])
    with pytest.raises(SpecError, match="not 7"):
        resolve([7])  # type: ignore[list-item]
    with pytest.raises(SpecError, match="'--KILL'"):
        resolve(["--KILL"])
    with pytest.raises(SpecError, match="''"):
        resolve([""])


def test_the_last_capability_is_the_kernels() -> None:
    assert capabilities.last() == int(Path("/proc/sys/kernel/cap_last_cap").read_text())


@pytest.mark.parametrize("named", [20, 63])
def test_the_last_capability_may_be_newer_or_older_than_the_names(
    named: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "NUMBERS", {"CHOWN": 0, "LAST": named})
    found = capabilities.last.__wrapped__()
    assert found == int(Path("/proc/sys/kernel/cap_last_cap").read_text())


@pytest.mark.parametrize("keep", [DEFAULT, NONE, ALL, frozenset({"SETPCAP", "BPF"})])
def test_a_process_keeps_exactly_the_capabilities_named(keep: frozenset[str]) -> None:
    def body() -> dict[str, int]:
        libc.capset(OWN["CapPrm"], OWN["CapPrm"], OWN["CapPrm"])  # something to inherit,
        libc.prctl(libc.PR_CAP_AMBIENT, 2, NUMBERS["KILL"])  # PR_CAP_AMBIENT_RAISE: and to give
        assert status()["CapAmb"] == mask({"KILL"})
        capabilities.drop_to(keep)
        return status()

    after = in_child(body)
    kept = mask(keep) & OWN["CapPrm"]
    assert after["CapBnd"] == after["CapPrm"] == after["CapEff"] == kept
    assert after["CapInh"] == after["CapAmb"] == 0


def test_a_program_executed_as_root_gets_nothing_back() -> None:
    def body() -> str:
        capabilities.drop_to(frozenset({"KILL"}))
        return subprocess.check_output(["grep", "Cap[PEB]", "/proc/self/status"], text=True)

    masks = [int(line.split()[1], 16) for line in in_child(body).splitlines()]
    assert masks == [mask({"KILL"})] * 3


def test_a_capability_that_the_caller_lacks_is_not_asked_for() -> None:
    def body() -> dict[str, int]:
        held = OWN["CapPrm"] & ~mask({"CHOWN"})
        libc.capset(held, held, 0)
        assert status()["CapBnd"] & mask({"CHOWN"})
        capabilities.drop_to(frozenset({"CHOWN", "KILL"}))
        capabilities.drop_to(frozenset({"CHOWN", "KILL"}))  # and again without SETPCAP
        return status()

    assert in_child(body)["CapPrm"] == mask({"KILL"})


def test_the_bounding_set_does_not_stay_larger_in_silence() -> None:
    def body() -> str:
        held = OWN["CapPrm"] & ~mask({"SETPCAP"})
        libc.capset(held, held, 0)
        with pytest.raises(PermissionError) as refused:
            capabilities.drop_to(DEFAULT)
        return str(refused.value)

    assert "prctl 24" in in_child(body)


@pytest.mark.parametrize(("keep", "error"), [(DEFAULT, 0), (DEFAULT - {"CHOWN"}, errno.EPERM)])
def test_chown_needs_its_capability(tmp_path: Path, keep: frozenset[str], error: int) -> None:
    def body() -> int:
        capabilities.drop_to(keep)
        try:
            os.chown(tmp_path, 1, 1)
        except OSError as refused:
            return refused.errno or -1
        return 0

    assert in_child(body) == error


def test_the_kernel_says_that_no_new_privileges_and_a_filter_are_on() -> None:
    after = filtered(status)
    assert (after["NoNewPrivs"], after["Seccomp"]) == (1, 2)
    before = in_child(status)
    assert (before["NoNewPrivs"], before["Seccomp"]) == (0, 0)


def test_a_filter_without_no_new_privs_needs_to_be_root() -> None:
    def body() -> int | None:
        capabilities.drop_to(NONE)
        try:
            seccomp.install(seccomp.program(NONE) or b"")
        except OSError as refused:
            return refused.errno
        return None

    assert in_child(body) == errno.EACCES


@pytest.mark.parametrize(
    ("name", "arguments", "capability"),
    [
        ("mount", (POINTER, POINTER, POINTER, 0, 0), "SYS_ADMIN"),
        ("umount2", (POINTER, 0), "SYS_ADMIN"),
        ("open_tree", (-1, POINTER, 0), "SYS_ADMIN"),
        ("setns", (-1, 0), "SYS_ADMIN"),
        ("unshare", (libc.CLONE_NEWUSER,), "SYS_ADMIN"),
        ("unshare", (libc.CLONE_NEWTIME,), "SYS_ADMIN"),
        ("bpf", (-1, 0, 0), "BPF"),
        ("bpf", (-1, 0, 0), "SYS_ADMIN"),
        ("perf_event_open", (POINTER, 0, -1, -1, 0), "PERFMON"),
        ("finit_module", (-1, POINTER, 0), "SYS_MODULE"),
        ("settimeofday", (0, 0), "SYS_TIME"),
        ("keyctl", (0, -3, 1), None),
        ("io_uring_setup", (1, POINTER), None),
        ("personality", (0x0040000,), None),
    ],
)
def test_a_call_is_denied_unless_its_capability_is_kept(
    name: str, arguments: tuple[Any, ...], capability: str | None
) -> None:
    def body() -> str:
        return syscall(name, *arguments)

    assert in_child(body) != "EPERM", "the kernel refuses it by itself, so nothing is shown here"
    assert filtered(body) == "EPERM"
    assert filtered(body, DEFAULT) == "EPERM"
    if capability is None:
        assert filtered(body, ALL) == "EPERM"
    else:
        assert filtered(body, frozenset({capability})) != "EPERM"
        assert filtered(body, ALL - {"SYS_ADMIN", "BPF", "PERFMON", capability}) == "EPERM"


@pytest.mark.parametrize(
    "flag",
    ["NEWNS", "NEWCGROUP", "NEWUTS", "NEWIPC", "NEWUSER", "NEWPID", "NEWNET"],
)
def test_clone_makes_processes_but_no_namespaces(flag: str) -> None:
    def clone(flags: int) -> str:
        parent = os.getpid()
        error = syscall("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
        if os.getpid() != parent or c_libc.getppid() == parent:
            os._exit(0)
        return error

    def body() -> str:
        return clone(getattr(libc, f"CLONE_{flag}"))

    assert in_child(body) == ""
    assert filtered(body) == "EPERM"
    assert filtered(body, frozenset({"SYS_ADMIN"})) == ""
    assert filtered(lambda: clone(0)) == ""


def test_unshare_parts_what_is_no_namespace() -> None:
    assert filtered(lambda: syscall("unshare", 0x400)) == ""  # CLONE_FILES


def test_threads_and_processes_start_without_clone3() -> None:
    def body() -> list[Any]:
        seen: list[str] = []
        thread = threading.Thread(target=seen.append, args=("thread",))
        thread.start()
        thread.join()
        output = subprocess.check_output([sys.executable, "-c", "print('program')"], text=True)
        child = os.fork()
        if not child:
            os._exit(7)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return [syscall("clone3", 0, 0), *seen, output, code]

    assert filtered(body) == ["ENOSYS", "thread", "program\n", 7]
    assert filtered(lambda: syscall("clone3", 0, 0), frozenset({"SYS_ADMIN"})) == "EINVAL"


def test_nothing_can_be_typed_into_the_terminal() -> None:
    def body() -> list[str]:
        _, terminal = os.openpty()
        # The kernel takes the low word of a request, whatever is above it.
        requests = (termios.TIOCSTI, 1 << 32 | termios.TIOCSTI, termios.TIOCGWINSZ)
        room = ctypes.create_string_buffer(8)
        address = ctypes.c_void_p(ctypes.addressof(room))
        return [syscall("ioctl", terminal, request, address) for request in requests]

    assert in_child(body) == ["", "", ""]
    assert filtered(body) == ["EPERM", "EPERM", ""]


def test_only_the_way_to_the_hypervisor_is_closed_to_sockets() -> None:
    def body() -> list[int]:
        errors = []
        for family in (socket.AF_VSOCK, socket.AF_INET, socket.AF_UNIX, socket.AF_NETLINK):
            try:
                socket.socket(
                    family, socket.SOCK_RAW if family == 16 else socket.SOCK_STREAM
                ).close()
                errors.append(0)
            except OSError as refused:
                errors.append(refused.errno or -1)
        return errors

    assert in_child(body)[0] != errno.EPERM
    assert filtered(body) == [errno.EPERM, 0, 0, 0]


def int80() -> Callable[[int, int, int, int], int]:
    """A function that makes a system call by the i386 ABI from a 64-bit process."""
    code = bytes.fromhex(
        "53"  # push rbx
        "89f8 89f3 4189d0 89ca 4489c1"  # eax, ebx, ecx, edx = edi, esi, edx, ecx
        "cd80 5b c3"  # int 0x80; pop rbx; ret
    )
    page = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    start = ctypes.c_char.from_buffer(page)  # keeps the page mapped
    function = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_uint,) * 4)(ctypes.addressof(start))
    return lambda *words: int(function(*words)) if start else 0


@pytest.mark.skipif(not X86, reason="i386 calls need an x86_64 machine")
def test_the_i386_abi_is_filtered_by_its_own_numbers() -> None:
    def body() -> list[str]:
        call = int80()
        numbers = {"bpf": 357, "umount": 22, "clock_settime64": 404, "unshare": 310, "socket": 359}
        arguments = {"unshare": libc.CLONE_NEWUTS, "socket": 40}
        results = [call(n, arguments.get(name, 0xFFFFFFFF), 0, 0) for name, n in numbers.items()]
        results += [call(54, 0, termios.TIOCSTI, 0), call(435, 0, 0, 0)]
        results.append(call(20, 0, 0, 0) - os.getpid())
        # 165 is mount by the other ABI and getresuid by this one: EFAULT
        results.append(call(165, 1, 1, 1))
        return [errno.errorcode[-result] if result else "" for result in results]

    probe = os.fork()
    if not probe:
        os._exit(int80()(20, 0, 0, 0) != os.getpid())
    if os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1]) == -signal.SIGSEGV:
        pytest.skip("this kernel runs without the i386 ABI (ia32_emulation=0)")
    assert "EPERM" not in in_child(body)
    assert filtered(body) == ["EPERM"] * 6 + ["ENOSYS", "", "EFAULT"]


def test_every_denied_call_is_denied() -> None:
    column = 0 if X86 else 2
    rows = [line.split() for line in seccomp._DENIED.strip().splitlines()]
    calls = {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}
    assert len(calls) > 50
    words = (0xFFFFFFFF,) * 6
    assert filtered(lambda: {name: syscall(number, *words) for name, number in calls.items()}) == (
        dict.fromkeys(calls, "EPERM")
    )


HEADERS = {1: "unistd_64.h", 2: "unistd_32.h"}


@pytest.mark.parametrize("column", HEADERS)
def test_the_numbers_are_those_of_the_kernels_headers(column: int) -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm", HEADERS[column])
    if not header.exists():
        pytest.skip("apt install linux-libc-dev")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    rows = [line.split() for line in seccomp._DENIED.strip().splitlines()]
    newest = max(map(int, known.values()))
    rows = [row for row in rows if row[column] == "-" or int(row[column]) <= newest]
    assert {row[0]: row[column] for row in rows} == {row[0]: known.get(row[0], "-") for row in rows}


def run(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel's interpreter would return for a call on a machine that we are not on."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *(0,) * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        op, jt, jf, k = code[at]
        at += 1
        if op == 0x06:
            return int(k)
        if op == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        else:
            taken = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: accumulator & k,
            }[op]
            at += jt if taken else jf


def test_aarch64_has_a_filter_of_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    arm64, allow, eperm, enosys = 0xC00000B7, 0x7FFF0000, 0x50001, 0x50026
    program = seccomp.program(NONE)
    assert program is not None
    for name in ("mount", "bpf", "keyctl", "setns", "settimeofday", "io_uring_setup"):
        assert run(program, arm64, CALLS[name][1]) == eperm, name
    assert run(program, arm64, 220, signal.SIGCHLD) == allow
    assert run(program, arm64, 220, libc.CLONE_NEWNET) == eperm
    assert run(program, arm64, 29, 0, termios.TIOCSTI) == eperm
    assert run(program, arm64, 29, 0, termios.TIOCGWINSZ) == allow
    assert run(program, arm64, 435) == enosys
    assert run(program, arm64, 63) == allow
    assert run(program, 0x40000028, 3) == 0x80000000, "32-bit ARM"
    privileged = seccomp.program(frozenset({"SYS_ADMIN"}))
    assert privileged is not None
    assert run(privileged, arm64, 40) == run(privileged, arm64, 435) == allow


def test_nothing_is_denied_but_what_is_listed() -> None:
    for keep in (NONE, DEFAULT, ALL):
        program = seccomp.program(keep)
        assert program is not None
        arch, column = (0xC000003E, 0) if X86 else (0xC00000B7, 2)
        rows = [line.split() for line in seccomp._DENIED.strip().splitlines()]
        listed = {
            int(row[1 + column])
            for row in rows
            if keep.isdisjoint(row[4:]) and row[1 + column] != "-"
        }
        listed |= set() if "SYS_ADMIN" in keep else {435}
        assert {n for n in range(471) if run(program, arch, n) != 0x7FFF0000} == listed


def test_a_machine_whose_numbers_are_unknown_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert seccomp.program(DEFAULT) is None


def test_calls_newer_than_the_filter_and_those_of_x32_do_not_exist() -> None:
    program = seccomp.program(ALL)
    assert program is not None
    arch = 0xC000003E if X86 else 0xC00000B7
    assert run(program, arch, 470) == 0x7FFF0000
    assert [run(program, arch, number) for number in (471, 1 << 30, 1 << 30 | 165)] == [0x50026] * 3


def test_a_tracer_can_skip_a_call() -> None:
    program = seccomp.program(NONE)
    assert program is not None
    arch = 0xC000003E if X86 else 0xC00000B7
    assert run(program, arch, 0xFFFFFFFF) == 0x7FFF0000
