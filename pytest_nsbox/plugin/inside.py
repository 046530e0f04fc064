"""A test whose body runs inside, as the pytest process sees it.

What is shared with other tests is set up outside, by pytest's own part of the hooks. Then one fork
enters the container and goes through the phases of the test there, one at a time, with all hooks
of all plugins; the reports that it makes are logged here, once, by whoever runs the protocol.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from _pytest import runner
from _pytest.logging import caplog_records_key
from _pytest.runner import CallInfo, check_interactive_exception

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.plugin import luggage, measured, options, wider
from pytest_nsbox.plugin.body import Body, depth, reporting
from pytest_nsbox.plugin.boxes import boxes_of
from pytest_nsbox.plugin.circumstances import (
    hooks_come_first,
    is_not_run,
    spec_defaults,
)
from pytest_nsbox.plugin.deadline import Deadline
from pytest_nsbox.plugin.images import of_the_suite
from pytest_nsbox.plugin.passthrough import passthrough
from pytest_nsbox.plugin.raised import Raised, not_in_tracebacks
from pytest_nsbox.plugin.report import changed_by_body
from pytest_nsbox.plugin.specs import spec_of
from pytest_nsbox.plugin.summary import add_changes
from pytest_nsbox.session.container import Container
from pytest_nsbox.session.inside import PATIENCE, Inside
from pytest_nsbox.session.surroundings import added_for_a_fork, working_directory

# the plugins whose part in setting up and tearing down is done outside, too; the last is of
# pytest-cov, and says for which test lines are run
_PYTESTS_OWN = ("runner", "capturemanager", "logging-plugin", "_cov_contexts")
# seconds for an interrupted body to tear down its fixtures; a standstill of both takes one of them
_FAREWELL = 5


@contextlib.contextmanager
def taken_over(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """For the time of one item's protocol, have its phases run inside.

    There is no hook around a phase and its report: a plugin that repeats tests calls pytest's
    `runtestprotocol` as often as it likes. So the function that does a phase is replaced.
    """
    visit = _Visit(item, nextitem, runner.call_and_report)
    runner.call_and_report = visit.call_and_report
    try:
        yield
    except KeyboardInterrupt:
        visit.end_as_interrupted()
        raise
    finally:
        runner.call_and_report = visit.original
        visit.leave()
    if not visit.happened:
        text = f"{item.nodeid} has run outside: another plugin runs its phases in its own way"
        item.config.issue_config_time_warning(pytest.PytestWarning(text), stacklevel=2)


class _Visit:
    """The runs of one item: more than one when a plugin repeats it."""

    def __init__(
        self, item: pytest.Item, nextitem: pytest.Item | None, original: Callable[..., Any]
    ) -> None:
        self.item: Any = item
        self.nextitem = nextitem
        self.original = original
        self.happened = False
        self._plain = False  # skipped by a mark: there is no body to be inside
        self._failed_outside = False  # the same, as wider fixtures could not be set up
        self._inside: Inside | None = None
        self._parted = False  # it has been interrupted, and asked for its last word
        self._container: Container | None = None
        self._faults = -1  # where the body's faulthandler writes
        self._began = time.monotonic()
        self._deadline: Deadline | None = None
        self._suspended = False  # whether wider fixtures are kept for another run
        self._raised: Raised | None = None  # by the body's teardown
        self._failures: list[BaseException] = []  # the same, made anew
        self._last: pytest.TestReport | None = None
        self._stack = contextlib.ExitStack()
        self._depth = 0  # of the stack, where pytest would do a phase

    def call_and_report(
        self, item: pytest.Item, when: Any, log: bool = True, **keywords: Any
    ) -> pytest.TestReport:
        """In place of `_pytest.runner.call_and_report`."""
        self.happened = True
        if item is self.item and when == "setup":
            self._plain = is_not_run(item)
            self._depth = depth()
        if item is not self.item or self._plain:
            report: pytest.TestReport = self.original(item, when, log, **keywords)
            return report
        if when == "setup":
            return self._set_up(log)
        if when == "teardown" and not self._failed_outside:
            return self._tear_down(log, keywords["nextitem"])
        if when == "teardown":
            return self._tear_down_what_failed(log, keywords["nextitem"])
        return self._phase(when, log)

    # ------------------------------------------------------------------ phases

    def _set_up(self, log: bool) -> pytest.TestReport:
        if hooks_come_first(self.item) and not wider.are_set_up(self.item):
            entered = CallInfo.from_call(
                lambda: self._enter(log, probe=True), "setup", self._reraise
            )
            if entered.excinfo is not None:
                self.leave()
                return self._own_report(entered, log)
            with contextlib.suppress(_Reached):
                return self._phase("setup", log)
            self.leave()
        outside = CallInfo.from_call(self._set_up_outside, "setup", self._reraise)
        self._failed_outside = outside.excinfo is not None
        entered = outside
        if not self._failed_outside:
            entered = CallInfo.from_call(
                functools.partial(self._enter, log), "setup", self._reraise
            )
        if entered.excinfo is not None:
            self.leave()
            return self._own_report(entered, log)

        def with_outside(report: pytest.TestReport) -> None:
            if report.when == "setup":
                report.duration += outside.duration
                report.start = outside.start

        return self._phase("setup", log, with_outside)

    def _set_up_outside(self) -> None:
        """Collectors, and fixtures of a wider scope: their output is part of the test's set-up."""
        item = self.item
        if hasattr(item, "_request") and not item._request:
            item._initrequest()
        item.setup = lambda: wider.set_up(item)
        stack = item.session._setupstate.stack
        try:
            self._pytests_own("pytest_runtest_setup")(item=item)
        except BaseException:
            if item in stack:
                stack[item][0].remove(item.teardown)  # its own set-up has not begun
            raise
        finally:
            del item.setup
        # the child sets the item up in earnest, and tears it down
        stack.pop(item, None)

    def _phase(
        self, when: str, log: bool, adjust: Callable[[pytest.TestReport], None] | None = None
    ) -> pytest.TestReport:
        """Have the body go through a phase; the report that it makes, logged if asked for."""
        started = time.time()
        clock = time.perf_counter()
        assert self._inside is not None
        if when != "setup":
            last = when == "teardown" and self.nextitem is None
            self._inside.reply(pickle.dumps((when, log, last)))
        logged: list[pytest.TestReport] = []
        while True:
            data = self._hear()
            if data is None:
                report = self._crashed(when, started, time.perf_counter() - clock)
                if log:
                    self.item.ihook.pytest_runtest_logreport(report=report)
                return report
            *before, (kind, value) = pickle.loads(data)  # the child is the test itself
            for _, row in before:
                logged.append(self._log(row, adjust))
            if kind == "log":
                logged.append(self._log(value, adjust))
                session = self.item.session
                self._inside.reply(pickle.dumps((session.shouldstop, session.shouldfail)))
            elif kind == "done":
                report, late, brought = value
                luggage.unpack(self.item, brought)
                self._raised = brought.get("raised")
                self._suspended = brought.get("suspended", False)
                if late is not None:
                    report = logged[-1]
                    vars(report).update(late)
                elif adjust is not None:
                    adjust(report)
                self._last = report
                return report
            elif kind == "reached":
                raise _Reached
            else:
                self._end_the_run(*value)

    def end_as_interrupted(self) -> None:
        """Have the body tear its fixtures down where this process did not listen to it just then:
        it may be in its next phase already, or wait to be told of it."""
        if self._inside is None or self._parted:
            return
        data = self._farewell()
        if data is not None:
            *before, (_, (brought, error, place)) = pickle.loads(data)
            for _, row in before:
                self._log(row, None)
            if place is not None:
                self._end_the_run(brought, error, place)
            luggage.unpack(self.item, brought)

    def _end_the_run(
        self, brought: dict[str, Any], error: BaseException, place: tuple[str, int] | None
    ) -> NoReturn:
        """As the body has been interrupted, or has called `pytest.exit`."""
        assert self._inside is not None
        luggage.unpack(self.item, brought)
        self._inside.reply(b"")
        self.leave()
        _raise_at(error, place)

    def _log(
        self,
        row: tuple[pytest.TestReport, dict[str, Any]],
        adjust: Callable[[pytest.TestReport], None] | None,
    ) -> pytest.TestReport:
        report, brought = row
        luggage.unpack(self.item, brought)
        if adjust is not None:
            adjust(report)
        self.item.ihook.pytest_runtest_logreport(report=report)
        return report

    def _tear_down(self, log: bool, nextitem: pytest.Item | None) -> pytest.TestReport:
        if nextitem is None:
            self.nextitem = None
        report = None if self._inside is None else self._phase("teardown", log=False)
        changes: list[tuple[str, str]] = []
        # where nothing was set up outside
        self.item.stash.setdefault(caplog_records_key, {})
        if self._suspended:  # nothing that this test shares with itself is torn down
            nextitem = self.item

        @not_in_tracebacks
        def outside() -> None:
            try:
                if self._container is not None and options.is_on(self.item.config, "changes"):
                    changes.extend(changed_by_body(self._container))
                self.leave()
            finally:
                if self._raised is not None:
                    # so that what is torn down outside adds its own errors to it
                    self._fail_with(self._raised)
                self._pytests_own("pytest_runtest_teardown")(item=self.item, nextitem=nextitem)

        call = CallInfo.from_call(outside, "teardown", self._reraise)
        report = self._one_teardown(report, call)
        if changes:
            add_changes(report, changes)
        if log:
            self.item.ihook.pytest_runtest_logreport(report=report)
        return report

    def _tear_down_what_failed(self, log: bool, nextitem: pytest.Item | None) -> pytest.TestReport:
        """There has been no body, so the plugins that are to hear of its end hear of it here."""
        stack = self.item.session._setupstate.stack
        before = dict(stack)
        report: pytest.TestReport = self.original(self.item, "teardown", log, nextitem=nextitem)
        # one that is about to repeat the test takes away what is not to be torn down, and would
        # put it back in the body that comes to its end
        kept = {node: row for node, row in before.items() if row[0] or node in stack}
        stack.clear()
        stack.update(kept)
        return report

    def _one_teardown(
        self, report: pytest.TestReport | None, call: CallInfo[None]
    ) -> pytest.TestReport:
        """The report of the body's teardown, which may have none, and of the one outside."""
        raised = None if call.excinfo is None else call.excinfo.value
        only_the_bodys = self._failures == [*getattr(raised, "exceptions", [raised])]
        if report is not None and (raised is None or only_the_bodys):
            report.duration += call.duration
            _merge_sections(report, self.item)
            return report
        own = self._own_report(call, log=False)
        if report is not None:
            _merge_sections(own, self.item)
            own.duration += report.duration
        return own

    def _fail_with(self, raised: Raised) -> None:
        """Have the item's own teardown raise what it has raised inside."""
        error = raised.again()
        # several are a group of its own that pytest makes
        self._failures = [*getattr(error, "exceptions", [error])]

        def finalizer(one: BaseException) -> Callable[[], None]:
            @not_in_tracebacks
            def again() -> None:
                raise one

            return again

        finalizers = [finalizer(one) for one in self._failures]
        self.item.session._setupstate.stack[self.item] = (finalizers, None)

    # ------------------------------------------------------------------ parts

    @property
    def _reraise(self) -> tuple[type[BaseException], ...]:
        """What ends the run, and is no outcome of the test."""
        if self.item.config.getoption("usepdb", False):
            return (pytest.exit.Exception,)
        return (pytest.exit.Exception, KeyboardInterrupt)

    def _own_report(self, call: CallInfo[Any], log: bool) -> pytest.TestReport:
        hook = self.item.ihook
        report: pytest.TestReport = hook.pytest_runtest_makereport(item=self.item, call=call)
        if log:
            hook.pytest_runtest_logreport(report=report)
        if check_interactive_exception(call, report):
            hook.pytest_exception_interact(node=self.item, call=call, report=report)
        return report

    def _pytests_own(self, hook: str) -> Any:
        """A hook, with no other implementations than pytest's own."""
        manager = self.item.config.pluginmanager
        own = [manager.get_plugin(name) for name in _PYTESTS_OWN]
        others = [plugin for plugin in manager.get_plugins() if plugin not in own]
        return manager.subset_hook_caller(hook, others)

    def _enter(self, log: bool, *, probe: bool = False) -> None:
        """Make the container, and fork the body into it."""
        item = self.item
        spec = spec_of(item, spec_defaults(item))
        boxes = boxes_of(item.config)
        if spec.user is not None:
            raise UnsupportedError(
                f"user={spec.user!r}: a body runs inside as who runs pytest, or tmp_path would be "
                "out of its reach; take nsbox_container and run commands as that user"
            )
        container = self._stack.enter_context(
            boxes.container(
                item,
                None,
                spec,
                passthrough=passthrough(item.config),
                visible=[tempfile.gettempdir()],  # fixtures of a wider scope have files there
                body=of_the_suite(item.session),
            )
        )
        self._container = container
        self._faults = os.memfd_create("nsbox-faults")
        self._stack.callback(os.close, self._faults)
        self._deadline = Deadline(item, self._began)
        reporting(item.config)
        measured.begin(item.config)
        body = Body(
            item,
            self.nextitem,
            self.original,
            self._faults,
            self._deadline,
            self._depth,
        )
        env = added_for_a_fork(container)
        # the watchdog is a thread that the child would wait for in vain; the child starts its own
        faulthandler.cancel_dump_traceback_later()
        self._inside = Inside(
            container, lambda talk: body.run(talk, env, log, probe), working_directory(container)
        )

    def _hear(self) -> bytes | None:
        """The body's next message; None when it has ended without one."""
        assert self._inside is not None
        try:
            return self._inside.receive()
        except KeyboardInterrupt:
            data = self._farewell()
            if data is None:
                raise
            return data

    def _farewell(self) -> bytes | None:
        """What an interrupted body has to say; None when it does not come to it."""
        assert self._inside is not None
        self._parted = True
        # from a terminal the body has been interrupted as well, and knows where
        for second in range(1 + _FAREWELL):
            if second == 1:
                self._inside.signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                data = self._inside.receive(1.0)
                if data is None:
                    return None
                *before, (kind, _) = pickle.loads(data)
                if kind == "raised":
                    return data
                for _, row in before:
                    self._log(row, None)
        return None

    def leave(self) -> None:
        """End the body, if there is one, and take its container down."""
        inside, self._inside = self._inside, None
        self._parted = False
        if inside is not None:
            inside.signal(signal.SIGKILL)  # who closes its container waits for its end
        deadline, self._deadline = self._deadline, None
        if deadline is not None:
            deadline.give_back()
        self._container = None
        stack, self._stack = self._stack, contextlib.ExitStack()
        stack.close()

    def _crashed(self, when: Any, started: float, duration: float) -> pytest.TestReport:
        """The report of a phase in which the body has ended."""
        assert self._inside is not None
        assert self._container is not None
        inside, self._inside = self._inside, None
        code = inside.end()
        dead = self._container.death(patience=PATIENCE if code == -signal.SIGKILL else 0)
        if dead is not None:
            text = str(dead)
        elif code < 0:
            text = f"the test's process was killed by {signal.Signals(-code).name}"
        else:
            text = f"the test ended its process with status {code}, without a report"
        faults = os.pread(self._faults, 1 << 16, 0).decode(errors="replace").rstrip()
        item = self.item
        sections = list(self._last.sections) if self._last is not None else []
        capture = item.config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            output = capture.read_global_capture()
            names = (f"Captured {name} {when}" for name in ("stdout", "stderr"))
            sections += [pair for pair in zip(names, output, strict=True) if pair[1]]
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed",
            longrepr=f"{item.location[0]}:{(item.location[1] or 0) + 1}: {text}"
            + (f"\n{faults}" if faults else ""),
            when=when,
            sections=sections,
            duration=duration,
            start=started,
            stop=started + duration,
            user_properties=list(item.user_properties),
        )


def _merge_sections(report: pytest.TestReport, item: Any) -> None:
    """Add what the teardown outside has printed."""
    rows = luggage.merged_sections(item._report_sections)
    report.sections = [(f"Captured {key} {when}", text) for when, key, text in rows if text] + [
        row for row in report.sections if not row[0].startswith("Captured ")
    ]


class _Reached(Exception):
    """The body has come to where wider fixtures are set up."""


def _raise_at(error: BaseException, place: tuple[str, int] | None) -> NoReturn:
    """Raise what ends the run as if from the line of the test that it came from."""
    if place is None:
        raise error
    path, line = place
    exec(compile("\n" * (line - 1) + "raise error", path, "exec"), {"error": error})
    raise AssertionError  # it has raised
