"""Which of the collected tests ask for what this host cannot give: tried before the first runs."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.model.spec import SandboxSpec
from pytest_nsbox.plugin import options
from pytest_nsbox.plugin.boxes import boxes_of
from pytest_nsbox.plugin.options import runs_inside, uses_fixture
from pytest_nsbox.plugin.specs import defaults, keywords
from pytest_nsbox.session.session import Session

_SHOWN = 5  # of the tests that lack the same, without -v

Need = tuple[str, Any]


def foresee(config: pytest.Config, items: Sequence[pytest.Item]) -> list[str]:
    """What will be missing, why and where, for the report."""
    told = _lacking_later(boxes_of(config).session, items)
    for reason, hit in _lacking(boxes_of(config).session, items).items():
        what = f"{len(hit)} test{'s' * (len(hit) > 1)} cannot run here, and "
        if options.value(config, "unsupported") == "skip":
            what += "will be skipped"
        else:
            what += "will be in error (--nsbox-unsupported=skip skips such)"
        lines = [f"{what}: {reason}"]
        shown = hit if config.option.verbose > 0 else hit[:_SHOWN]
        lines += [f"  {nodeid}" for nodeid in shown]
        if len(shown) < len(hit):
            lines.append(f"  and {len(hit) - len(shown)} more; all of them with -v")
        told.append("\n".join(lines))
    return told


def _lacking(session: Session, items: Sequence[pytest.Item]) -> dict[str, list[str]]:
    """The tests that will be hit, by reason."""
    reasons: dict[Need, str] = {}
    lacking: dict[str, list[str]] = {}
    for item in items:
        if not (runs_inside(item) or uses_fixture(item)):
            continue
        with contextlib.suppress(NsboxError):  # which the test itself will raise
            for need, attempt in _needs(item, session):
                if need not in reasons:
                    reasons[need] = _reason(attempt)
                if reasons[need]:
                    lacking.setdefault(reasons[need], []).append(item.nodeid)
                    break
    return lacking


def _needs(item: pytest.Item, session: Session) -> Iterator[tuple[Need, Callable[[], object]]]:
    """What a test needs that not every host has, and how to try it."""
    yield ("containers", True), session.describe
    spec = defaults(item.config).replace(**keywords(item))
    yield from _keywords(spec, session)
    has_container = runs_inside(item) or "nsbox_container_factory" in item.fixturenames  # type: ignore[attr-defined]
    if spec.network == "nat" and not spec.networks and has_container:
        yield ("way out", True), lambda: session.request("open_way_out")


def _keywords(spec: SandboxSpec, session: Session) -> Iterator[tuple[Need, Callable[[], object]]]:
    limits = {name: value for name, value in vars(spec.limits()).items() if value is not None}
    if limits:
        yield ("limits", repr(limits)), lambda: session.request("try_limits", limits=limits)
    for name in ("uptime", "userns"):
        value = getattr(spec, name)
        if value:
            alone = SandboxSpec.make(network="none", **{name: value})
            yield (name, value), functools.partial(session.try_out, alone)


def _reason(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except UnsupportedError as error:
        return str(error)
    except NsboxError:
        pass  # not the host's doing; the test itself will say so
    return ""


_FACTORIES = {"nsbox_container_factory", "nsbox_session"}
_ANY: dict[str, Any] = {"cpus": 1, "cpuset": "0", "memory": "64M", "pids": 10, "io": {"rbps": "1G"}}
_REASON = re.compile(r"\w+=(?:{.*?}|\S*?)(?: cannot be kept)?: (.*)")
_ANY |= {"uptime": "1d", "userns": True}


def _lacking_later(session: Session, items: Sequence[pytest.Item]) -> list[str]:
    """What this host lacks of all that tests could ask for, where some say only as they run what
    that is: with `nsbox_spec`, or as keywords of a factory."""
    if not any(map(_asks_later, items)) or _reason(session.describe):
        return []
    reasons: dict[str, list[str]] = {}
    # each by itself: in a user namespace of its own, a container may do what it may not without
    if any(_reason(attempt) for _, attempt in _keywords(SandboxSpec.make(**_ANY), session)):
        for name, value in _ANY.items():
            for _, attempt in _keywords(SandboxSpec.make(**{name: value}), session):
                if found := _REASON.match(_reason(attempt)):
                    reasons.setdefault(found[1], []).append(f"{name}=")
    return [
        f"not here, should a test ask for it as it runs: {', '.join(names)}: {reason}"
        for reason, names in reasons.items()
    ]


def _asks_later(item: Any) -> bool:
    """Whether it takes a factory, or a fixture does that is not ours; or nsbox_spec is another."""
    if not hasattr(item, "_fixtureinfo"):
        return False
    asked = set(item._fixtureinfo.initialnames)
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        for definition in definitions:
            if not definition.func.__module__.startswith("pytest_nsbox."):
                asked.update(definition.argnames)
    specs = item.session._fixturemanager.getfixturedefs("nsbox_spec", item) or ()
    return not asked.isdisjoint(_FACTORIES) or len(specs) > 1
