"""An exception that a body has raised, brought out with the lines it came through.

A traceback cannot be pickled. It is made anew, from code that has nothing but a place in a file and
the name of a function.
"""

from __future__ import annotations

import ast
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from pytest_nsbox.plugin.luggage import can_travel

Function = TypeVar("Function", bound=Callable[..., object])

_CHAIN = ("__cause__", "__context__")
_DEEPEST = 20  # of what was raised because of something else


_NO_FILE = "<pytest-nsbox>"


def not_in_tracebacks(function: Function) -> Function:
    """Have pytest take it for generated code, which it leaves out as it does its own."""
    function.__code__ = function.__code__.replace(co_filename=_NO_FILE)
    return function


class Frame(NamedTuple):
    file: str
    name: str
    place: tuple[int, int, int, int]  # line and column of its begin and its end

    @classmethod
    def of(cls, found: traceback.FrameSummary) -> Frame:
        line = found.lineno or 1
        end = found.end_lineno or line
        return cls(found.filename, found.name, (line, found.colno or 0, end, found.end_colno or 0))

    def above(self, inner: types.TracebackType | None) -> types.TracebackType:
        """An entry of a traceback."""
        tree = ast.parse("raise Exception")
        for node in ast.walk(tree):
            node.lineno, node.col_offset, node.end_lineno, node.end_col_offset = self.place  # type: ignore[attr-defined]
        code = compile(tree, self.file, "exec").replace(co_name=self.name, co_qualname=self.name)
        try:
            exec(code, {})
        except Exception as error:
            here = error.__traceback__ and error.__traceback__.tb_next
        assert here is not None
        return types.TracebackType(inner, here.tb_frame, here.tb_lasti, self.place[0])


@dataclass
class Raised:
    """An exception as plain data, as far as it has to be."""

    error: BaseException | None  # None for one that cannot be pickled
    name: str
    module: str
    text: str
    frames: list[Frame]
    group: list[Raised] | None = None
    chain: dict[str, Raised] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException, depth: int = 0) -> Raised:
        frames = traceback.extract_tb(error.__traceback__)
        found = cls(
            error=None,
            name=type(error).__name__,
            module=type(error).__module__,
            text=str(error),
            frames=[Frame.of(frame) for frame in frames if frame.filename != _NO_FILE],
        )
        if isinstance(error, BaseExceptionGroup):
            found.text = error.message
            found.group = [cls.of(one, depth + 1) for one in error.exceptions]
        elif can_travel(error):
            found.error = error
        for name in _CHAIN:
            reason = getattr(error, name)
            if reason is not None and depth < _DEEPEST:
                found.chain[name] = cls.of(reason, depth + 1)
        return found

    def again(self) -> BaseException:
        """The exception."""
        if self.group is not None:
            error: BaseException = BaseExceptionGroup(
                self.text, [one.again() for one in self.group]
            )
        elif self.error is not None:
            error = self.error
        else:
            error = type(self.name, (Exception,), {"__module__": self.module})(self.text)
        for name, reason in self.chain.items():
            setattr(error, name, reason.again())
        error.__suppress_context__ = "__cause__" in self.chain
        entry: types.TracebackType | None = None
        for frame in reversed(self.frames):
            entry = frame.above(entry)
        return error.with_traceback(entry)
