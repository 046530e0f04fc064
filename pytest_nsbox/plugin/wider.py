"""The fixtures of a test whose scope is wider than one test: they are set up outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from _pytest.compat import NOTSET
from _pytest.fixtures import SubRequest


def set_up(item: Any) -> None:
    """Set up those that the test asks for, directly or by others."""
    for name, definitions in _of(item):
        _set_up_widest(item._request, name, definitions)


def are_set_up(item: Any) -> bool:
    """Whether there is nothing left to do for `set_up`."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    for name, definitions in _of(item):
        wide = definitions[0]
        if wide.cached_result is None or wide.cached_result[1] is not params.get(name):
            return False
    return True


def _of(item: Any) -> Iterator[tuple[str, list[Any]]]:
    """The names that lead to one, each with its fixtures from the nearest to that one."""
    found = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    scopes = getattr(getattr(item, "callspec", None), "_arg2scope", {})
    # to a function that is in no class, that scope is its own
    narrow = ("function",) if item.getparent(pytest.Class) else ("function", "class")
    for name in getattr(item, "fixturenames", ()):
        scope = scopes.get(name)
        if scope is not None and scope.value in narrow:
            continue
        definitions = []
        for fixture in reversed(found.get(name, ())):
            definitions.append(fixture)
            if fixture.scope not in narrow:
                yield name, definitions[::-1]
                break
            if name not in fixture.argnames:  # it hides those that it overrides
                break


def _set_up_widest(request: Any, name: str, definitions: list[Any]) -> None:
    """It may be overridden by fixtures of function scope that ask for it, and are not set up."""
    for fixture in reversed(definitions[1:]):
        request = SubRequest(request, fixture._scope, NOTSET, 0, fixture, _ispytest=True)
    request.getfixturevalue(name)
    if definitions[1:]:
        # the name is that of the nearest one
        del request._fixture_defs[name]
