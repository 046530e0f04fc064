"""The filter on the system calls of a container (seccomp(2)).

It denies what Docker's default profile denies: calls that reach past the namespaces (keyrings,
kernel modules, the clock, io_uring) and calls that would make new namespaces, in which a process
has all capabilities again. A call that goes with a capability is let through where that is kept.

The program is laid out for the kernel's cache (5.11): at installation the kernel runs a filter for
every system call number, and those that it allows without a look at an argument skip the filter
from then on. The few calls whose arguments matter run the filter each time, and come first. The
others are searched by halves, for the sake of the thousand runs at installation.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct
from dataclasses import dataclass
from enum import IntEnum

from pytest_nsbox.kernel import libc

# linux/audit.h
_AUDIT_ARCH_I386 = 0x40000003
_AUDIT_ARCH_X86_64 = 0xC000003E
_AUDIT_ARCH_AARCH64 = 0xC00000B7

# linux/seccomp.h
_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000

# linux/bpf_common.h: class, size and mode, or class, operation and source, in one number
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_GREATER = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

# struct seccomp_data: nr, arch, instruction_pointer, args[6]
_NR = 0
_ARCH = 4

# Where the column of each machine's ABIs is in the tables below. A call that comes by an ABI
# without a column (32-bit ARM) kills its process: its numbers would mean other calls.
_ABIS = {
    "x86_64": ((_AUDIT_ARCH_X86_64, 0), (_AUDIT_ARCH_I386, 1)),
    "aarch64": ((_AUDIT_ARCH_AARCH64, 2),),
}

# The newest call that was thought about here (Linux 6.19). What comes later is not there yet, as
# for a program on an older kernel: libraries probe for new calls and fall back at ENOSYS.
# The x32 ABI, a bit set in the number, is beyond it too.
_NEWEST = 470

# Calls denied: name, its numbers for x86_64, i386 and aarch64 ("-"
# where there is none), and the capabilities of which any one allows it ("never": none does).
# Calls that no kernel since 5.11 implements (create_module, nfsservctl, vm86 …) need no line.
_DENIED = """
mount                    165  21  40  SYS_ADMIN
umount                     -  22   -  SYS_ADMIN
umount2                  166  52  39  SYS_ADMIN
pivot_root               155 217  41  SYS_ADMIN
open_tree                428 428 428  SYS_ADMIN
open_tree_attr           467 467 467  SYS_ADMIN
move_mount               429 429 429  SYS_ADMIN
fsopen                   430 430 430  SYS_ADMIN
fsconfig                 431 431 431  SYS_ADMIN
fsmount                  432 432 432  SYS_ADMIN
fspick                   433 433 433  SYS_ADMIN
mount_setattr            442 442 442  SYS_ADMIN
setns                    308 346 268  SYS_ADMIN
sethostname              170  74 161  SYS_ADMIN
setdomainname            171 121 162  SYS_ADMIN
swapon                   167  87 224  SYS_ADMIN
swapoff                  168 115 225  SYS_ADMIN
quotactl                 179 131  60  SYS_ADMIN
quotactl_fd              443 443 443  SYS_ADMIN
lookup_dcookie           212 253  18  SYS_ADMIN
fanotify_init            300 338 262  SYS_ADMIN
bpf                      321 357 280  SYS_ADMIN BPF
perf_event_open          298 336 241  SYS_ADMIN PERFMON
syslog                   103 103 116  SYS_ADMIN SYSLOG
open_by_handle_at        304 342 265  DAC_READ_SEARCH
init_module              175 128 105  SYS_MODULE
finit_module             313 350 273  SYS_MODULE
delete_module            176 129 106  SYS_MODULE
reboot                   169  88 142  SYS_BOOT
kexec_load               246 283 104  SYS_BOOT
kexec_file_load          320   - 294  SYS_BOOT
acct                     163  51  89  SYS_PACCT
settimeofday             164  79 170  SYS_TIME
stime                      -  25   -  SYS_TIME
clock_settime            227 264 112  SYS_TIME
clock_settime64            - 404   -  SYS_TIME
kcmp                     312 349 272  SYS_PTRACE
pidfd_getfd              438 438 438  SYS_PTRACE
process_madvise          440 440 440  SYS_PTRACE
userfaultfd              323 374 282  SYS_PTRACE
get_mempolicy            239 275 236  SYS_NICE
set_mempolicy            238 276 237  SYS_NICE
set_mempolicy_home_node  450 450 450  SYS_NICE
mbind                    237 274 235  SYS_NICE
migrate_pages            256 294 238  SYS_NICE
move_pages               279 317 239  SYS_NICE
iopl                     172 110   -  SYS_RAWIO
ioperm                   173 101   -  SYS_RAWIO
chroot                   161  61  51  SYS_CHROOT
vhangup                  153 111  58  SYS_TTY_CONFIG
add_key                  248 286 217  never
request_key              249 287 218  never
keyctl                   250 288 219  never
io_uring_setup           425 425 425  never
io_uring_enter           426 426 426  never
io_uring_register        427 427 427  never
sysfs                    139 135   -  never
ustat                    136  62   -  never
uselib                   134  86   -  never
"""

# clone3 has its flags in memory, where a filter cannot look. Without it a libc uses clone.
_CLONE3 = 435

_NEW_NAMESPACE = (
    libc.CLONE_NEWNS
    | libc.CLONE_NEWCGROUP
    | libc.CLONE_NEWUTS
    | libc.CLONE_NEWIPC
    | libc.CLONE_NEWUSER
    | libc.CLONE_NEWPID
    | libc.CLONE_NEWNET
)
_TIOCSTI = 0x5412
_TIOCLINUX = 0x541C
_AF_VSOCK = 40


class _Action(IntEnum):
    """How a section ends, in the order of the instructions that end it."""

    ALLOW = 0
    EPERM = 1
    ENOSYS = 2


_RETURNS = (_RET_ALLOW, _RET_ERRNO | errno.EPERM, _RET_ERRNO | errno.ENOSYS)


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """A call that its argument decides: one of `values` matches, or none does.

    Only the low word of the argument is looked at: it is all that the kernel reads of these.
    """

    call: tuple[int, int, int]  # its number by column
    argument: int
    compare: int
    values: tuple[int, ...]
    match: _Action
    otherwise: _Action
    allowed_by: str = "never"

    def assemble(self, column: int) -> list[_Instruction]:
        *first, final = self.values
        return [
            (_EQUAL, 0, len(self.values) + 1, self.call[column]),
            (_LOAD, 0, 0, 16 + 8 * self.argument),
            *((self.compare, self.match, 0, value) for value in first),
            (self.compare, self.match, self.otherwise, final),
        ]


_RULES = (
    # ioctl, by far the most frequent of these: both type into the terminal that the processes of
    # a container may share with whoever started pytest.
    _Rule(
        call=(16, 54, 29),
        argument=1,
        compare=_EQUAL,
        values=(_TIOCSTI, _TIOCLINUX),
        match=_Action.EPERM,
        otherwise=_Action.ALLOW,
    ),
    # socket: a virtual machine's channel to its host is in no network namespace.
    _Rule(
        call=(41, 359, 198),
        argument=0,
        compare=_EQUAL,
        values=(_AF_VSOCK,),
        match=_Action.EPERM,
        otherwise=_Action.ALLOW,
    ),
    # clone
    _Rule(
        call=(56, 120, 220),
        argument=0,
        compare=_ANY_BIT,
        values=(_NEW_NAMESPACE,),
        match=_Action.EPERM,
        otherwise=_Action.ALLOW,
        allowed_by="SYS_ADMIN",
    ),
    # unshare: the bit of CLONE_NEWTIME is clone's exit signal, so that only this call takes it.
    _Rule(
        call=(272, 310, 97),
        argument=0,
        compare=_ANY_BIT,
        values=(_NEW_NAMESPACE | libc.CLONE_NEWTIME,),
        match=_Action.EPERM,
        otherwise=_Action.ALLOW,
        allowed_by="SYS_ADMIN",
    ),
    # personality: PER_LINUX and PER_LINUX32, each with UNAME26 or not, and the query
    _Rule(
        call=(135, 136, 92),
        argument=0,
        compare=_EQUAL,
        values=(0, 8, 0x20000, 0x20008, 0xFFFFFFFF),
        match=_Action.ALLOW,
        otherwise=_Action.EPERM,
    ),
)

# struct sock_filter: code, jt, jf, k. A jump goes to an end of its section or over as many
# instructions as its number says; the enumeration tells the two apart.
_Instruction = tuple[int, int, int, int]


def install(program: bytes) -> None:
    """Filter the calling thread, and all that it starts, by `program` from here on.

    Needs `capabilities.no_new_privs()` before, or CAP_SYS_ADMIN.
    """
    libc.seccomp_set_filter(program)


def prepare(program: bytes) -> None:
    """Do before a fork what `install` would do after it."""
    libc.sock_fprog(program)


def program(keep: frozenset[str]) -> bytes | None:
    """The filter for a container that keeps the capabilities `keep`, as packed instructions.

    None on a machine whose numbers of system calls are not known here.
    """
    return _program(keep, platform.machine())


@functools.cache
def _program(keep: frozenset[str], machine: str) -> bytes | None:
    if machine not in _ABIS:
        return None
    code: list[_Instruction] = [(_LOAD, 0, 0, _ARCH)]
    for arch, column in _ABIS[machine]:
        section = _section(column, keep)
        code += [(_EQUAL, 0, len(section), arch), *section]
    code.append((_RETURN, 0, 0, _RET_KILL_PROCESS))
    # Jumps have one byte; struct refuses what does not fit.
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _section(column: int, keep: frozenset[str]) -> list[_Instruction]:
    """What is done with the calls of one ABI."""
    code: list[_Instruction] = [(_LOAD, 0, 0, _NR)]
    for rule in _RULES:
        if rule.allowed_by not in keep:
            code += rule.assemble(column)
    # A tracer skips a call by making its number -1; its result is the tracer's.
    code.append((_EQUAL, _Action.ALLOW, 0, 0xFFFFFFFF))
    code.append((_GREATER, _Action.ENOSYS, 0, _NEWEST))
    code += _search(sorted(_denied(column, keep).items()))

    def resolve(position: int, target: int) -> int:
        return len(code) + target - position - 1 if isinstance(target, _Action) else target

    return [
        *((op, resolve(i, jt), resolve(i, jf), k) for i, (op, jt, jf, k) in enumerate(code)),
        *((_RETURN, 0, 0, value) for value in _RETURNS),
    ]


def _denied(column: int, keep: frozenset[str]) -> dict[int, _Action]:
    calls = {} if "SYS_ADMIN" in keep else {_CLONE3: _Action.ENOSYS}
    for line in _DENIED.strip().splitlines():
        _, *fields = line.split()
        number, allowed_by = fields[column], fields[3:]
        if number != "-" and keep.isdisjoint(allowed_by):
            calls[int(number)] = _Action.EPERM
    return calls


def _search(calls: list[tuple[int, _Action]]) -> list[_Instruction]:
    """What finds a number in `calls`, which are in ascending order; others are allowed."""
    if len(calls) <= 4:
        *first, (number, action) = calls
        return [
            *((_EQUAL, action, 0, number) for number, action in first),
            (_EQUAL, action, _Action.ALLOW, number),
        ]
    middle = len(calls) // 2
    lower = _search(calls[:middle])
    return [(_AT_LEAST, len(lower), 0, calls[middle][0]), *lower, *_search(calls[middle:])]
