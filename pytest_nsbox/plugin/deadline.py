"""The time limit of a test: neither a timer nor a thread crosses a fork, so it is moved."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest


class Deadline:
    """Taken from the pytest process before a fork, and kept by the child until its end.

    It is a timer of the kernel's (setitimer(2)), or the thread that pytest-timeout starts with its
    method "thread", which in the child ends the child.
    """

    def __init__(self, item: pytest.Item, item_began: float) -> None:
        self._item: Any = item
        self._began = time.monotonic()
        self._timer = signal.setitimer(signal.ITIMER_REAL, 0)
        self._thread = _thread_of(item)
        self._left = 0.0
        if self._thread is not None:
            self._left = self._thread.interval - (self._began - item_began)
            self._thread.cancel()

    def start(self, faults: int) -> None:
        """In the child; what it dies of is written to `faults`."""
        self.resume()
        if self._thread is not None:
            self._start_thread(faults)

    def pause(self) -> None:
        """While the child waits for its parent: that time is not the test's."""
        self._timer = signal.setitimer(signal.ITIMER_REAL, 0)

    def resume(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, *self._timer)

    def give_back(self) -> None:
        """In the pytest process, when the child has ended."""
        taken = time.monotonic() - self._began
        if self._timer[0] > taken:
            signal.setitimer(signal.ITIMER_REAL, self._timer[0] - taken, self._timer[1])
        if self._thread is not None and self._left > taken:
            self._left -= taken
            self._start_thread(None)

    def _start_thread(self, faults: int | None) -> None:
        old = self._thread
        assert old is not None

        def expire() -> None:
            if faults is not None:
                text = f"pytest-timeout ended it after {old.interval:g} s; its stacks are above"
                os.write(faults, text.encode())
            old.function(*old.args, **old.kwargs)

        new = threading.Timer(max(self._left, 0), expire)
        new.name = old.name
        new.daemon = True

        def cancel() -> None:
            new.cancel()
            if new is not threading.current_thread():
                new.join()

        self._item.cancel_timeout = cancel
        new.start()


def _thread_of(item: Any) -> threading.Timer | None:
    name = f"pytest_timeout {item.nodeid}"
    for thread in threading.enumerate():
        if thread.name == name and isinstance(thread, threading.Timer):
            return thread
    return None
