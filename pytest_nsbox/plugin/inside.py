"""A test whose body runs inside: set up outside as far as its scope reaches beyond the test, then
one fork that enters the container and does the rest."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from _pytest.runner import CallInfo, runtestprotocol

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.plugin.boxes import boxes_of
from pytest_nsbox.plugin.specs import spec_of
from pytest_nsbox.session.container import Container
from pytest_nsbox.session.inside import PATIENCE, Inside


def run_inside(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The whole protocol of one item (`pytest_runtest_protocol`)."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    with _initialised(item):
        held: list[pytest.TestReport] = []
        setup = _phase(item, "setup", lambda: _set_up_outside(item))
        if setup.excinfo is None:
            setup = _phase(item, "setup", lambda: _run(item, held))
        if setup.excinfo is not None:
            _log(item, _report(item, setup))
        _tear_down_outside(item, nextitem, held)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _phase(item: pytest.Item, when: Any, function: Any) -> CallInfo[Any]:
    reraise = (pytest.exit.Exception, KeyboardInterrupt)
    return CallInfo.from_call(function, when=when, reraise=reraise)


def _report(item: pytest.Item, call: CallInfo[Any]) -> pytest.TestReport:
    capture = _capture(item)
    if capture is not None:
        for name, text in zip(("stdout", "stderr"), capture.read_global_capture(), strict=True):
            item.add_report_section(call.when, name, text)
    report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    return report


def _log(item: pytest.Item, report: pytest.TestReport) -> None:
    item.ihook.pytest_runtest_logreport(report=report)


def _capture(item: pytest.Item) -> Any:
    return item.config.pluginmanager.getplugin("capturemanager")


@contextlib.contextmanager
def _captured(item: pytest.Item) -> Iterator[None]:
    """Capture output, and leave it where the next reader, the child or `_report`, finds it."""
    capture = _capture(item)
    if capture is None:
        yield
        return
    capture.resume_global_capture()
    try:
        yield
    finally:
        capture.suspend_global_capture(in_=False)


@contextlib.contextmanager
def _initialised(item: Any) -> Iterator[None]:
    """The request of a function, for the time of its run, as pytest's own runner has it."""
    if hasattr(item, "_request") and not item._request:
        item._initrequest()
    yield
    if hasattr(item, "_request"):
        item._request = False
        item.funcargs = None


def _set_up_outside(item: Any) -> None:
    """Set up what is shared with other tests: collectors, and fixtures of a wider scope."""
    with _captured(item):
        item.session._setupstate.setup(item.parent)
        _set_up_wider_fixtures(item)


def _set_up_wider_fixtures(item: Any) -> None:
    definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    # a request is good only while its item is being set up; the child sets it up in earnest
    item.session._setupstate.stack[item] = ([], None)
    try:
        for name in getattr(item, "fixturenames", ()):
            if name in definitions and definitions[name][-1].scope != "function":
                item._request.getfixturevalue(name)
    finally:
        del item.session._setupstate.stack[item]


def _tear_down_outside(
    item: Any, nextitem: pytest.Item | None, held: list[pytest.TestReport]
) -> None:
    """Tear down what no later test shares, and log it with the child's own teardown."""

    def tear_down() -> None:
        with _captured(item):
            item.session._setupstate.teardown_exact(nextitem)

    call = _phase(item, "teardown", tear_down)
    report = _report(item, call)
    if call.excinfo is not None:
        for other in held:
            if other.failed:
                _log(item, other)
        _log(item, report)
        return
    for other in held or [report]:
        if other is not report:
            _append_sections(other, report)
        _log(item, other)


def _append_sections(report: pytest.TestReport, more: pytest.TestReport) -> None:
    for name, text in more.sections:
        old = dict(report.sections).get(name)
        if old is None:
            report.sections.append((name, text))
        elif name.endswith("teardown"):
            report.sections[report.sections.index((name, old))] = (name, old + text)


def _spec_defaults(item: Any) -> Any:
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


def _run(item: pytest.Item, held: list[pytest.TestReport]) -> None:
    """Make the container, run the rest of the test in it, and report what comes out."""
    spec = spec_of(item, _spec_defaults(item))
    temporary = getattr(item.config, "_tmp_path_factory", None)
    keep = [] if temporary is None else [str(temporary.getbasetemp())]
    boxes = boxes_of(item.config)
    if not boxes.session.resolve_rootfs(spec.rootfs).is_host:
        raise UnsupportedError(
            f"a body runs inside with pytest's own Python, so on the host's root, not on "
            f"{spec.rootfs!r}; take nsbox_container to drive that one from outside"
        )
    if spec.user is not None:
        raise UnsupportedError(
            f"user={spec.user!r}: a body runs inside as who runs pytest, or tmp_path would be out "
            "of its reach; take nsbox_container and run commands as that user"
        )
    with boxes.container(item, None, spec, passthrough=keep) as container:
        _run_in(item, container, held)


def _run_in(item: pytest.Item, container: Container, held: list[pytest.TestReport]) -> None:
    # the watchdog is a thread that the child would wait for in vain; the child starts its own
    faulthandler.cancel_dump_traceback_later()
    inside = Inside(
        container, lambda send: _body(item, container, send), container.working_directory()
    )
    done = False
    try:
        for data in inside.messages():
            kind, value = pickle.loads(data)  # the child is the test itself
            if kind == "report":
                hook = item.config.hook.pytest_report_from_serializable
                report = hook(config=item.config, data=value)
                if report.when == "teardown":
                    held.append(report)
                    done = True
                else:
                    _log(item, report)
            elif kind == "exit":
                pytest.exit(*value)
            else:
                raise KeyboardInterrupt
    except BaseException:
        inside.kill()
        raise
    code = inside.end()
    if not done:
        _log(item, _crashed(item, container, code))


def _body(item: Any, container: Container, send: Any) -> None:
    """In the child: pytest's own protocol, down to this item and no further."""
    config = item.config
    os.environ.update(container.spec.env)
    _watch(config)
    config.pluginmanager.register(_Reports(config, send), "nsbox-reports")
    try:
        # not logged here, where other plugins would pass it on, but by the parent
        runtestprotocol(item, log=False, nextitem=item.parent)
    except pytest.exit.Exception as error:
        send(pickle.dumps(("exit", (error.msg, error.returncode))))
    except KeyboardInterrupt:
        send(pickle.dumps(("interrupt", None)))


def _watch(config: pytest.Config) -> None:
    """Dump tracebacks of a body that takes too long, as pytest's faulthandler plugin does."""
    stderr = config.stash.get(fault_handler_stderr_fd_key, None)
    if stderr is None:  # the plugin is not in use, and its options are unknown
        return
    timeout = float(config.getini("faulthandler_timeout") or 0)
    if timeout > 0:
        faulthandler.dump_traceback_later(timeout, file=stderr)


class _Reports:
    """Sends every report out as soon as it is made."""

    def __init__(self, config: pytest.Config, send: Any) -> None:
        self.config = config
        self.send = send

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        hook = self.config.hook.pytest_report_to_serializable
        self.send(pickle.dumps(("report", hook(config=self.config, report=report))))
        return report


def _crashed(item: pytest.Item, container: Container, code: int) -> pytest.TestReport:
    """The report of a body that ended without one."""
    dead = container.death(patience=PATIENCE if code == -signal.SIGKILL else 0)
    if dead is not None:
        text = str(dead)
    elif code < 0:
        text = f"the test's process was killed by {signal.Signals(-code).name}"
    else:
        text = f"the test ended its process with status {code}, without a report"
    sections = []
    capture = _capture(item)
    if capture is not None:
        for name, output in zip(("stdout", "stderr"), capture.read_global_capture(), strict=True):
            if output:
                sections.append((f"Captured {name} call", output))
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=f"{item.location[0]}:{(item.location[1] or 0) + 1}: {text}",
        when="call",
        sections=sections,
    )
