"""What can go wrong, as types.

Every message says what failed and on what, and, where there is a cure, what to do.
The kernel layer raises plain `OSError`; it becomes one of these at the edge of a process.
"""

from __future__ import annotations

import subprocess


class NsboxError(Exception):
    """Base of every error that pytest-nsbox raises on purpose."""


class SpecError(NsboxError, ValueError):
    """A keyword, option or address that cannot mean anything: the user's mistake."""


class RootfsError(NsboxError):
    """A root filesystem source that does not exist, cannot be read, or cannot be started from."""


class UnsupportedError(NsboxError):
    """This host cannot give what was asked for; the message has the reason and the cure."""


def not_linux(system: str) -> str:
    """What to do on another system."""
    return (
        f"containers need Linux, this is {system}; run the tests in a Linux virtual machine "
        "(WSL 2, Lima), or mark them to be skipped: --nsbox-unsupported=skip"
    )


class SetupError(NsboxError):
    """A step of building a container failed: the operation, its object and the error number."""


class TeardownError(NsboxError):
    """Something of a container could not be taken down."""


class ContainerDied(NsboxError):
    """The container is gone: stopped, killed, or its launcher has ended."""


class OutOfMemory(ContainerDied):
    """The container was killed because it went over its `memory` limit."""


class ContainerTimeout(ContainerDied):
    """The container was killed because it outlived its `timeout`."""


class WaitError(NsboxError):
    """What was waited for did not happen, or can no longer happen."""


class CallError(NsboxError):
    """A function called inside ended without a result that could be brought out."""


class CommandError(NsboxError, subprocess.CalledProcessError):
    """A command run with `check=True` failed.

    It is a `subprocess.CalledProcessError` whose text also has the end of what the command wrote.
    """

    def __str__(self) -> str:
        text = subprocess.CalledProcessError.__str__(self)
        for name, stream in (("stderr", self.stderr), ("stdout", self.stdout)):
            if stream:
                lines = stream if isinstance(stream, str) else stream.decode(errors="replace")
                return f"{text}\n{name} ends:\n" + "\n".join(lines.splitlines()[-10:])
        return text


BY_NAME: dict[str, type[NsboxError]] = {
    kind.__name__: kind
    for kind in (
        NsboxError,
        SpecError,
        RootfsError,
        UnsupportedError,
        SetupError,
        TeardownError,
        ContainerDied,
        OutOfMemory,
        ContainerTimeout,
        WaitError,
        CallError,
    )
}
"""The errors that may cross a socket, by the name that stands for them there."""
