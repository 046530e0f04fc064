"""Which of the collected tests ask for what this host cannot give: tried before the first runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from pytest_nsbox.errors import NsboxError, UnsupportedError
from pytest_nsbox.model.spec import SandboxSpec
from pytest_nsbox.plugin import options
from pytest_nsbox.plugin.boxes import boxes_of
from pytest_nsbox.plugin.specs import defaults, keywords, runs_inside, uses_fixture
from pytest_nsbox.session.session import Session

_SHOWN = 5  # of the tests that lack the same, without -v

Need = tuple[str, Any]


def foresee(config: pytest.Config, items: Sequence[pytest.Item]) -> list[str]:
    """What will be missing, why and where, for the report."""
    told = []
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
    """What a test needs that not every host has, and how to try it. What it asks for when it
    runs, by `nsbox_spec` or as a factory's keywords, is not known yet."""
    yield ("containers", True), session.describe
    spec = defaults(item.config).replace(**keywords(item))
    limits = {name: value for name, value in vars(spec.limits()).items() if value is not None}
    if limits:
        yield ("limits", repr(limits)), lambda: session.request("try_limits", limits=limits)
    has_container = runs_inside(item) or "nsbox_container_factory" in item.fixturenames  # type: ignore[attr-defined]
    if spec.network == "nat" and not spec.networks and has_container:
        yield ("way out", True), lambda: session.request("open_way_out")
    for name in ("uptime", "userns"):
        value = getattr(spec, name)
        if value:
            alone = SandboxSpec.make(network="none", **{name: value})
            yield (name, value), functools.partial(_make, session, alone)


def _make(session: Session, spec: SandboxSpec) -> None:
    session.container(spec=spec).close()


def _reason(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except UnsupportedError as error:
        return str(error)
    except NsboxError:
        pass  # not the host's doing; the test itself will say so
    return ""
