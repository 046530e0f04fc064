"""The capabilities of Linux by name (capabilities(7)), and which of them a container keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pytest_nsbox.errors import SpecError

_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID
SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER
SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE
SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF
CHECKPOINT_RESTORE
"""

NUMBERS: dict[str, int] = {name: number for number, name in enumerate(_NAMES.split())}
"""The number of each capability, by its name without CAP_ (linux/capability.h)."""

ALL: frozenset[str] = frozenset(NUMBERS)

_DOCKER = """
CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP
NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE
"""

DEFAULT: frozenset[str] = frozenset(_DOCKER.split()) | {"NET_ADMIN"}
"""What a container keeps unless told otherwise: Docker's default set, and NET_ADMIN."""


def mask(names: Iterable[str]) -> int:
    """The capabilities `names` as the kernel's bit mask."""
    return sum(1 << NUMBERS[name] for name in frozenset(names))


def resolve(changes: Sequence[str], *, own_network: bool = True) -> frozenset[str]:
    """The capabilities kept after `changes` to the default set, in their order. NET_ADMIN is in
    that for a network of the container's own: over the host's it takes being asked for.

    A change is "+SYS_ADMIN" (or "SYS_ADMIN"), "-NET_RAW", "+ALL" or "-ALL"; the prefix CAP_ and
    lower case are as good. Raises SpecError for a name that is no capability.
    """
    kept = DEFAULT if own_network else DEFAULT - {"NET_ADMIN"}
    for change in changes:
        named = _named(change)
        kept = kept - named if change.startswith("-") else kept | named
    return kept


def _named(change: object) -> frozenset[str]:
    if not isinstance(change, str):
        raise SpecError(f"a capability is a string like '+SYS_ADMIN', not {change!r}")
    name = change.removeprefix("-" if change.startswith("-") else "+")
    name = name.upper().removeprefix("CAP_")
    if name == "ALL":
        return ALL
    if name in NUMBERS:
        return frozenset({name})
    import difflib  # not for the launcher and each init

    near = " or ".join(difflib.get_close_matches(name, NUMBERS))
    raise SpecError(
        f"{change!r} is not a capability"
        + (f", did you mean {near}?" if near else "")
        + " Allowed, with + or - in front: ALL "
        + " ".join(sorted(NUMBERS))
    )
