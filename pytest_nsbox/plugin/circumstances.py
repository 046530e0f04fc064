"""What a body's way depends on, known before it begins: its marks, and who else has a say."""

from __future__ import annotations

from typing import Any

import pytest
from _pytest import skipping


def is_not_run(item: pytest.Item) -> bool:
    """Whether its marks say so, or cannot be understood."""
    try:
        if skipping.evaluate_skip_marks(item) is not None:
            return True
        expected = None if item.config.option.runxfail else skipping.evaluate_xfail_marks(item)
    except pytest.fail.Exception:
        return True
    return expected is not None and not expected.run


def hooks_come_first(item: pytest.Item) -> bool:
    """Whether a plugin, such as a conftest, has its say before any fixture is set up."""
    for implementation in item.ihook.pytest_runtest_setup.get_hookimpls():
        module = getattr(implementation.function, "__module__", None) or ""
        if not module.startswith(("_pytest.", "pytest_nsbox.")):
            return True
    return False


def spec_defaults(item: Any) -> Any:
    """What an overridden nsbox_spec fixture says; it is asked outside, before the container."""
    definitions = item.session._fixturemanager.getfixturedefs("nsbox_spec", item)
    if not definitions:
        return None
    fixture = definitions[-1]
    if fixture.argnames:
        raise pytest.UsageError(
            f"{item.nodeid} runs inside, so its nsbox_spec fixture is asked before other fixtures "
            f"exist and cannot take {', '.join(fixture.argnames)}"
        )
    function = fixture.func
    if getattr(item, "instance", None) is not None and hasattr(
        type(item.instance), function.__name__
    ):
        function = getattr(item.instance, function.__name__)
        function = getattr(function, "_get_wrapped_function", lambda: function)()
    return function()
