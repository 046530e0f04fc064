"""Bodies on an image: what of the suite is shown there, and whether they can run, said early."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.plugin import options
from pytest_nsbox.plugin.boxes import boxes_of
from pytest_nsbox.plugin.options import runs_inside
from pytest_nsbox.plugin.specs import defaults, keywords

_PATHS = pytest.StashKey[list[str]]()


def of_the_suite(session: pytest.Session) -> list[str]:
    """The rootdir, where pytest has been started, and where the tests are."""
    stash, config = session.config.stash, session.config
    if _PATHS not in stash:
        tests = {os.fspath(item.path.parent) for item in session.items}
        here = (config.rootpath, config.invocation_params.dir)
        stash[_PATHS] = [*map(os.fspath, here), *sorted(tests)]
    return stash[_PATHS]


def check_images(session: pytest.Session) -> None:
    """Before the first test, try each image that bodies are to run on.

    Raises pytest.UsageError, but for what --nsbox-unsupported=skip has the tests skip. A worker
    of pytest-xdist could not say so; there the tests do.
    """
    config = session.config
    if hasattr(config, "workerinput") or options.value(config, "unsupported") == "skip":
        return
    default = defaults(config).rootfs
    tried: set[Any] = {"host"}
    for item in filter(runs_inside, session.items):
        source = keywords(item).get("rootfs", default)
        if source in tried or _others_have_a_say(item):
            continue
        tried.add(source)
        boxes = boxes_of(config).session
        try:
            boxes.python_on(boxes.resolve_rootfs(source), of_the_suite(session))
        except UnsupportedError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from None
        except Exception:
            continue  # also a hook's: every test with this one will say so, bodies or not


def _others_have_a_say(item: pytest.Item) -> bool:
    """Whether a hook or a fixture is asked for the spec once the test is run."""
    if item.ihook.pytest_nsbox_configure_spec.get_hookimpls():
        return True
    return len(item.session._fixturemanager.getfixturedefs("nsbox_spec", item) or ()) > 1
