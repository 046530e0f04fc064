"""What a body has left in the memory of pytest and of plugins, brought out to the parent.

A fork sees what the parent has; what it adds to that is its own. So what other plugins gather
over a whole run, and what they note on the item, travels with the reports.
"""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings
from typing import Any

import pytest
from _pytest.junitxml import xml_key

from pytest_nsbox.plugin import measured

# of an item: what belongs to its run, or is the same on both sides
_NOT_NOTES = frozenset(
    "_request funcargs _obj _instance instance session config parent _fixtureinfo fixturenames "
    "callspec _report_sections keywords own_markers stash _store user_properties obj setup".split()
)


def can_travel(value: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


def trimmed(value: Any) -> Any:
    """A dict or list without the elements that cannot travel."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if can_travel((key, item))}
    return [item for item in value if can_travel(item)]


def merged_sections(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """What a phase has printed outside and inside, as if it had been one, in pytest's order."""
    merged: dict[tuple[str, str], str] = {}
    for when, key, text in rows:
        before = merged.get((when, key), "")
        merged[when, key] = before + "\n" * (bool(before and text) and key == "log") + text
    phases, keys = ["setup", "call", "teardown"], ["stdout", "stderr", "log"]

    def place(row: tuple[str, str, str]) -> tuple[int, int]:
        when, key, _ = row
        return (
            phases.index(when) if when in phases else len(phases),
            keys.index(key) if key in keys else len(keys),
        )

    return sorted(((*where, text) for where, text in merged.items()), key=place)


class Pack:
    """In the child: what there was at the fork, and what has come since."""

    def __init__(self, item: pytest.Item) -> None:
        self.item: Any = item
        self.warnings: list[warnings.WarningMessage] | None = None
        self._notes = dict(vars(item))
        self._lengths = {name: len(found) for name, found in _gathered(item).items()}
        self.ends = (item.session.shouldstop, item.session.shouldfail)
        coverage = measured.current()
        self._measured = None if coverage is None else measured.Notes(coverage)
        self._snapshots = None
        if getattr(item.config, "_syrupy", None) is not None:
            from pytest_nsbox.plugin.snapshots import Snapshots

            self._snapshots = Snapshots(item)

    def close(self, *, last: bool) -> dict[str, Any]:
        """What has come up to now; what is gathered over the run comes with the last."""
        session = self.item.session
        found: dict[str, Any] = {"packed": self._packed() if last else ()}
        found |= {"notes": self._new_notes(), "warnings": self._new_warnings()}
        found["sections"] = list(self.item._report_sections)
        found["user_properties"] = trimmed(self.item.user_properties)
        if (session.shouldstop, session.shouldfail) != self.ends:
            found["ends"] = (session.shouldstop, session.shouldfail)
        counts = _failed_subtests(self.item)
        keys = (getattr(self.item, "id", None), self.item.nodeid)  # as of pytest 9.2, and before
        found["subtests"] = {key: counts[key] for key in keys if counts.get(key)}
        if last:
            found["gathered"] = {
                name: trimmed(map(_light, values[self._lengths.get(name, 0) :]))
                for name, values in _gathered(self.item).items()
            }
            found["attributes"] = _xml_attributes(self.item)
            if self._measured is not None:
                found["measured"] = self._measured.close()
            if self._snapshots is not None:
                found["snapshots"] = self._snapshots.close()
        return found

    def _packed(self) -> list[Any]:
        """What other plugins want to be brought out."""
        values = list(self.item.ihook.pytest_nsbox_pack(item=self.item))
        for value in values:
            if not can_travel(value):
                warnings.warn(
                    f"pytest_nsbox_pack: what cannot be pickled is left out: {value!r:.200}",
                    pytest.PytestWarning,
                    stacklevel=1,
                )
        found: list[Any] = trimmed(values)
        return found

    def _new_notes(self) -> dict[str, Any]:
        notes = {}
        for name, value in vars(self.item).items():
            if name in _NOT_NOTES or self._notes.get(name, self) is value:
                continue
            if can_travel(value):
                notes[name] = value
            elif isinstance(value, (dict, list)):
                notes[name] = trimmed(value)
        return notes

    def _new_warnings(self) -> list[tuple[Any, type[Warning], str, int]]:
        found = []
        for one in self.warnings or ():
            row = (one.message, one.category, one.filename, one.lineno)
            if not can_travel(row):
                row = (str(one.message), UserWarning, one.filename, one.lineno)
            found.append(row)
        if self.warnings:
            self.warnings.clear()
        return found


def unpack(item: Any, found: dict[str, Any]) -> None:
    """In the parent: put everything where it would be without a container."""
    vars(item).update(found["notes"])
    item.user_properties[:] = found["user_properties"]
    item._report_sections[:] = found["sections"]
    for message, category, filename, lineno in found["warnings"]:
        warnings.showwarning(message, category, filename, lineno)
    if "ends" in found:
        item.session.shouldstop, item.session.shouldfail = found["ends"]
    if found["subtests"]:
        _failed_subtests(item).update(found["subtests"])
    gathered = _gathered(item)
    for name, values in found.get("gathered", {}).items():
        gathered[name].extend(values)
    xml = item.config.stash.get(xml_key, None)
    for name, value in found.get("attributes", {}).items():
        xml.node_reporter(item.nodeid).add_attribute(name, value)
    if found.get("measured"):
        measured.add(item.config, found["measured"])
    if found.get("snapshots"):
        from pytest_nsbox.plugin import snapshots

        snapshots.unpack(item, found["snapshots"])
    if found.get("packed"):
        item.ihook.pytest_nsbox_unpack(item=item, packed=found["packed"])


def _gathered(item: Any) -> dict[str, list[Any]]:
    """The lists that are added to all through a run."""
    found = {}
    xml = item.config.stash.get(xml_key, None)
    if xml is not None:
        found["junitxml"] = xml.global_properties
    benchmarks = getattr(getattr(item.config, "_benchmarksession", None), "benchmarks", None)
    if benchmarks is not None:
        found["benchmark"] = benchmarks
    return found


def _failed_subtests(item: Any) -> dict[Any, int]:
    """How many subtests of each test have failed (pytest 9)."""
    module = sys.modules.get("_pytest.subtests")
    if module is None:
        return {}
    found: dict[Any, int] = item.config.stash.get(module.failed_subtests_key, {})
    return found


def _light(value: Any) -> Any:
    """A benchmark without the fixture that made it."""
    fixture = getattr(value, "fixture", None)
    if fixture is None:
        return value
    value = copy.copy(value)
    value.fixture = types.SimpleNamespace(has_error=getattr(fixture, "has_error", False))
    for name, attribute in vars(value).items():
        if not can_travel(attribute):
            setattr(value, name, trimmed(attribute) if isinstance(attribute, dict) else None)
    return value


def _xml_attributes(item: Any) -> dict[str, Any]:
    xml = item.config.stash.get(xml_key, None)
    if xml is None:
        return {}
    return dict(xml.node_reporter(item.nodeid).attrs)
