"""What has to be undone, in reverse, all of it, whatever fails on the way."""

from __future__ import annotations

from collections.abc import Callable

from pytest_nsbox.errors import TeardownError


class Undo:
    """A stack of steps back. It is filled while something is built and run once."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def push(self, what: str, step: Callable[[], object]) -> None:
        self._steps.append((what, step))

    def run(self) -> None:
        """Take every step, last first. Raises TeardownError for the first that failed; what
        failed after it is in its notes."""
        errors = []
        while self._steps:
            what, step = self._steps.pop()
            try:
                step()
            except Exception as error:
                errors.append(f"{what}: {error}")
        if errors:
            raised = TeardownError(errors[0])
            for later in errors[1:]:
                raised.add_note(f"then {later}")
            raise raised

    def run_after(self, first: BaseException) -> None:
        """The same when something has failed already: that stays the error, and what cannot be
        undone is in its notes."""
        try:
            self.run()
        except TeardownError as error:
            for line in [str(error), *getattr(error, "__notes__", ())]:
                first.add_note(f"while undoing: {line}")
