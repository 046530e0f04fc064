"""At collection: wrong markers are found, and the launcher is started in the background."""

from __future__ import annotations

import pytest

from pytest_nsbox.plugin import options
from pytest_nsbox.plugin.options import marked, on_linux, runs_inside, uses_fixture
from pytest_nsbox.plugin.specs import defaults, keywords
from pytest_nsbox.plugin.telling import is_first_worker, is_worker, tell


def check_markers(report: pytest.CollectReport, items: list[pytest.Item]) -> None:
    """Have a report say what is wrong with the markers of what it has collected."""
    errors = [error for item in items for error in _errors(item)]
    if errors:
        report.outcome = "failed"
        report.longrepr = "\n".join(errors)
        report.result = []


def _errors(item: pytest.Item) -> list[str]:
    from pytest_nsbox.errors import NsboxError

    try:
        spec = defaults(item.config).replace(**keywords(item))
        if isinstance(spec.rootfs, str) and on_linux() and not _hook_resolves(item):
            from pytest_nsbox import rootfs

            rootfs.check(spec.rootfs)
    except NsboxError as error:
        return [f"{item.nodeid}: @pytest.mark.sandbox: {error}"]
    return []


def _hook_resolves(item: pytest.Item) -> bool:
    """Whether a hook has the say on what a source means; then it is not ours to check."""
    return bool(item.ihook.pytest_nsbox_resolve_rootfs.get_hookimpls())


def begin(session: pytest.Session) -> None:
    """Start the launcher, and find what the tests will lack."""
    from pytest_nsbox.plugin.boxes import boxes_of

    boxes = boxes_of(session.config)
    if session.testsfailed:  # then there will be no tests, unless somebody insists
        return
    boxes.start()
    if any(runs_inside(item) for item in session.items):
        from pytest_nsbox.plugin.images import check_images

        check_images(session)
    if any(map(marked, session.items)):
        from pytest_nsbox.plugin.crowd import warn_of_crowd

        warn_of_crowd(session.config, session.items)
    if is_worker(session.config) and is_first_worker(session.config):
        # this process has no header to say it in
        for text in _lacking(session.config, session.items):
            tell(session.config, text)


def describe(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """For the header: how many tests get containers, and which of them are not confined."""
    inside = sum(runs_inside(item) for item in items)
    outside = sum(uses_fixture(item) for item in items)
    line = f"nsbox: {inside} tests inside containers, {outside} beside them"
    line += f" (rootfs {options.value(config, 'rootfs')}, {options.value(config, 'network')}"
    line += f" network {options.value(config, 'subnet')})"
    privileged = [
        item.nodeid for item in items if marked(item) and keywords(item).get("privileged")
    ]
    if privileged:
        line += f"; PRIVILEGED, without confinement: {', '.join(privileged)}"
    if config.option.collectonly or not on_linux():
        return [line]
    return [line, *_host(config, items)]


def _host(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """What this host gives and lacks, said before the first test."""
    from pytest_nsbox.errors import NsboxError
    from pytest_nsbox.plugin.boxes import boxes_of

    lacking = _lacking(config, items)  # opens the way out, of which is spoken next
    try:
        found = [boxes_of(config).session.describe(), *lacking]
    except NsboxError as error:
        found = lacking or [str(error)]
    return [f"nsbox: {text}" for text in found]


def _lacking(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    from pytest_nsbox.plugin.foresight import foresee

    return foresee(config, items)
