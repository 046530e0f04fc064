"""syrupy keeps in memory, until a run ends, what its assertions have found and what is to be
written to snapshots: that of a body is brought out."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest

from pytest_nsbox.plugin.luggage import can_travel


def session_of(item: pytest.Item) -> Any:
    """syrupy's own; None where it is not in use."""
    return getattr(item.config, "_syrupy", None)


class Snapshots:
    """In the child: what there was at the fork, and what has come since."""

    def __init__(self, item: pytest.Item) -> None:
        self.item = item
        session = session_of(item)
        self._assertions = len(session._assertions)
        self._queued = {
            place: dict(rows) for place, rows in session._queued_snapshot_writes.items()
        }
        # those that it writes at once are written outside, too; it reads what is queued first
        session._flush_snapshot_write_queue_key = lambda place: None

    def close(self) -> bytes:
        session = session_of(self.item)
        written = {}
        for place, rows in session._queued_snapshot_writes.items():
            before = self._queued.get(place, {})
            new = {key: data for key, data in rows.items() if before.get(key) is not data}
            if new:
                written[place] = new
        file = io.BytesIO()
        found = [self._light(one) for one in session._assertions[self._assertions :]]
        _Pickler(file, self.item).dump((found, written))
        return file.getvalue()

    def _light(self, assertion: Any) -> Any:
        """Without what it has been called with, and its exceptions with what they hold."""
        assertion = copy.copy(assertion)
        for name, value in vars(assertion).items():
            if name in ("session", "test_location", "_execution_results"):
                continue
            if not can_travel(value):
                setattr(assertion, name, None)
        results = {key: copy.copy(one) for key, one in assertion._execution_results.items()}
        for result in results.values():
            if not can_travel(result.exception):
                result.exception = Exception(str(result.exception))
        assertion._execution_results = results
        return assertion


def unpack(item: pytest.Item, data: bytes) -> None:
    """In the parent: as if the assertions had been made there."""
    session = session_of(item)
    found, written = _Unpickler(io.BytesIO(data), item).load()
    for assertion in found:
        session.register_request(assertion)
    for place, rows in written.items():
        session._queued_snapshot_writes[place].update(rows)
        if place[0].write_immediately:
            session._flush_snapshot_write_queue_key(place)


class _Pickler(pickle.Pickler):
    """The item and syrupy's session are the same on both sides."""

    def __init__(self, file: io.BytesIO, item: pytest.Item) -> None:
        super().__init__(file)
        self._same = {id(item): "item", id(session_of(item)): "session"}

    def persistent_id(self, found: Any) -> str | None:
        return self._same.get(id(found))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, item: pytest.Item) -> None:
        super().__init__(file)
        self._same = {"item": item, "session": session_of(item)}

    def persistent_load(self, name: str) -> Any:
        return self._same[name]
