"""The body of a test in its container: a fork of pytest that goes through the phases."""

from __future__ import annotations

import copy
import faulthandler
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext, suppress
from types import FrameType
from typing import Any, NamedTuple

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

from pytest_nsbox.plugin import luggage
from pytest_nsbox.plugin.deadline import Deadline
from pytest_nsbox.plugin.raised import Raised, not_in_tracebacks
from pytest_nsbox.session import inside
from pytest_nsbox.session.inside import Talk

_NAME = "nsbox-body"


class Phase(NamedTuple):
    """What is to be done next."""

    when: Any  # "setup", "call" or "teardown"
    log: bool
    last: bool = False  # of the run's last test


class Body:
    """Made before the fork, run after it."""

    def __init__(
        self,
        item: pytest.Item,
        nextitem: pytest.Item | None,
        call_and_report: Callable[..., pytest.TestReport],
        faults: int,
        deadline: Deadline,
        depth: int,
    ) -> None:
        self.item: Any = item
        self.nextitem = nextitem
        self.call_and_report = call_and_report
        self.faults = faults
        self.deadline = deadline
        self.depth = depth  # of the stack where a phase is done without us
        if fault_handler_stderr_fd_key in item.config.stash:
            item.config.getini("faulthandler_timeout")  # pytest keeps it, or each fork would read
        self._failure: BaseException | None = None
        self._suspended = False  # whether wider fixtures are kept for another run of the test
        self._logged: pytest.TestReport | None = None
        self._told: set[str] = set()  # its attributes then
        self._finalizers: list[Callable[[], object]] = []  # those left while the test is torn down
        self._unsaid: list[tuple[str, Any]] = []  # what can wait for the next word

    def run(self, talk: Talk, env: Mapping[str, str], log: bool, probe: bool) -> None:
        """In the child: until the test has been torn down, or ends the run. `log` is whether its
        set-up is to be.

        As a `probe` it does not get further than to where wider fixtures are set up.
        """
        self._begin(talk, env, probe)
        recording = self.item.config.pluginmanager.hasplugin("warnings")
        # the fork goes on from a deeper place, and is to recurse as far as without us
        sys.setrecursionlimit(sys.getrecursionlimit() + depth() + 1 - self.depth)
        # pytest records into a list of the parent's; its filters stay in force
        with warnings.catch_warnings(record=True) if recording else nullcontext() as recorded:
            self.pack.warnings = recorded
            self.deadline.start(self.faults)
            try:
                phase: Phase | None = Phase("setup", log)
                while phase is not None:
                    keywords = {}
                    if phase.when == "teardown":
                        keywords["nextitem"] = None if phase.last else self.nextitem
                    report = self.call_and_report(self.item, phase.when, phase.log, **keywords)
                    phase = self._done(phase.when, report)
            except (pytest.exit.Exception, KeyboardInterrupt) as error:
                self._end_the_run(error)

    def _begin(self, talk: Talk, env: Mapping[str, str], probe: bool) -> None:
        os.environ.update(env)
        if probe:
            self._end_where_wider_fixtures_are_set_up()
        self._talk = talk
        plugin: Any = self.item.config.pluginmanager.getplugin("logging-plugin")
        self.live_log: Any = getattr(plugin, "log_cli_handler", None)
        self.heading_shown = getattr(self.live_log, "_section_name_shown", False)
        self._watch()
        self._report_to_the_parent()
        self._tear_down_no_further_than_the_item()
        self.pack = luggage.Pack(self.item)

    def _done(self, when: str, report: pytest.TestReport) -> Phase | None:
        """Bring out how a phase has ended; returns what the next one is, None for none."""
        brought = self.pack.close(last=when == "teardown")
        if when == "teardown":
            brought["suspended"] = self._suspended
            if self._failure is not None:
                brought["raised"] = Raised.of(self._failure)
        late = None
        if report is self._logged:  # what was noted on it since, such as that pdb has shown it
            late = {name: vars(report)[name] for name in vars(report).keys() - self._told}
            late = luggage.trimmed(late)
        value = (portable(report) if late is None else None, late, brought)
        answer = self._say("done", value)
        return Phase(*pickle.loads(answer)) if answer else None

    def _end_the_run(self, error: BaseException) -> None:
        self.deadline.pause()
        with suppress(ValueError):  # not in a thread; the parent answers a second one
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        place = _place(error)
        with suppress(BaseException):  # the first one is what ends the run
            self.item.session._setupstate.teardown_exact(None)
        error = type(error)(*_arguments(error))
        self._say("raised", (self.pack.close(last=True), error, place))

    def _say(self, kind: str, value: Any) -> bytes:
        """Tell the parent and wait for its answer; that time does not count as the test's."""
        _flush_terminal(self.item.config)
        self.deadline.pause()
        unsaid, self._unsaid = self._unsaid, []
        answer = self._talk(pickle.dumps([*unsaid, (kind, value)]))
        self.deadline.resume()
        return answer

    # ------------------------------------------------------------------ this process's own pytest

    def _watch(self) -> None:
        """Dump tracebacks of a crash, and of a body that takes too long, as pytest does."""
        config = self.item.config
        stderr = config.stash.get(fault_handler_stderr_fd_key, None)
        if stderr is None:  # the plugin is not in use, and its options are unknown
            return
        faulthandler.enable(file=self.faults)
        timeout = float(config.getini("faulthandler_timeout") or 0)
        if timeout > 0:
            faulthandler.dump_traceback_later(timeout, file=stderr)

    def _report_to_the_parent(self) -> None:
        """Whoever counts, prints or sends on reports does so in the parent."""
        ours = reporting(self.item.config)
        ours.body = self
        caller: Any = self.item.config.hook.pytest_runtest_logreport
        caller._hookimpls[:] = [one for one in caller.get_hookimpls() if one.plugin is ours]

    def _end_where_wider_fixtures_are_set_up(self) -> None:
        """Only see whether a hook skips or fails the test before that."""

        def here(item: pytest.Item) -> None:
            capture: Any = self.item.config.pluginmanager.getplugin("capturemanager")
            if capture is not None:
                capture.read_global_capture()  # it will all be printed once more
            self._say("reached", None)
            os._exit(0)

        self.item.session._setupstate.setup = here

    def note_failure(self, error: BaseException) -> None:
        """What the phase that is now reported on has raised."""
        self._failure = error

    def log(self, report: pytest.TestReport) -> None:
        self._logged, self._told = report, {*vars(report)}
        word = ("log", (portable(report), self.pack.close(last=False)))
        if type(report) is pytest.TestReport and report.passed and not self._unsaid:
            # nothing but the end of the phase comes after it
            self._unsaid.append(word)
            return
        answer = self._say(*word)
        # whoever counts failures may have seen enough: subtests go on no further then
        self.pack.ends = pickle.loads(answer)
        self.item.session.shouldstop, self.item.session.shouldfail = self.pack.ends

    def _tear_down_no_further_than_the_item(self) -> None:
        """Hooks see the next item as ever, but wider fixtures are the parent's to end; those
        that were first asked for in here, by name, are this process's, and end with it."""
        state = self.item.session._setupstate
        shared = {node: len(finalizers) for node, (finalizers, _) in state.stack.items()}
        tear_down = state.teardown_exact

        @not_in_tracebacks
        def here(nextitem: pytest.Item | None) -> None:
            # a plugin that is about to repeat the test has taken them away from the stack
            self._suspended = not shared.keys() - {self.item} <= state.stack.keys()
            own = []
            for node, (finalizers, _) in state.stack.items():
                if node is not self.item:
                    own.append(finalizers[shared.get(node, 0) :])
                    del finalizers[shared.get(node, 0) :]

            def wider() -> None:
                for finalizers in reversed(own):
                    while finalizers:
                        finalizers.pop()()

            if self.item in state.stack:
                self._finalizers, _ = state.stack[self.item]
                self._finalizers.insert(0, wider)
            else:  # an interrupt has come between; in pytest the end of wider ones ends these, too
                state.stack[self.item] = (self._finalizers, None)
            tear_down(self.item.parent)

        state.teardown_exact = here


def depth() -> int:
    """How many frames the caller's stack has."""
    frame: FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None:
        found, frame = found + 1, frame.f_back
    return found


def reporting(config: pytest.Config) -> Reporting:
    """The one of this run, registered before the fork, as that takes its time."""
    found: Reporting | None = config.pluginmanager.getplugin(_NAME)
    if found is None:
        found = Reporting()
        config.pluginmanager.register(found, _NAME)
    return found


class Reporting:
    """The hooks that are only a body's: in the pytest process they do nothing."""

    def __init__(self) -> None:
        self.body: Body | None = None

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.body is not None:
            self.body.log(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """The live log's heading may have been printed for the fixtures outside."""
        if self.body is not None and self.body.heading_shown:
            self.body.live_log._section_name_shown = True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: Any, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """The set-up outside and the one inside have printed as one."""
        if self.body is not None:
            if call.when == "teardown" and call.excinfo is not None:
                self.body.note_failure(call.excinfo.value)
            item._report_sections[:] = luggage.merged_sections(item._report_sections)
        return (yield)


def portable(report: Any) -> Any:
    """A report as it can be brought out: without what a plugin has put on it that cannot."""
    if luggage.can_travel(report):
        return report
    report = copy.copy(report)
    for name, value in list(vars(report).items()):
        if luggage.can_travel(value):
            continue
        if name in ("longrepr", "sections", "user_properties"):
            setattr(report, name, str(value) if name == "longrepr" else luggage.trimmed(value))
        else:
            delattr(report, name)
    return report


def _place(error: BaseException) -> tuple[str, int] | None:
    """Where the test was, for the last line of an interrupted run; None where it was not at work,
    but waited to be told of its next phase."""
    from _pytest._code import ExceptionInfo

    with suppress(Exception):
        entry = ExceptionInfo.from_exception(error)._getreprcrash()
        if entry is not None and str(entry.path) != inside.__file__:
            return str(entry.path), entry.lineno
    return None


def _arguments(error: BaseException) -> tuple[Any, ...]:
    if isinstance(error, pytest.exit.Exception):
        return (error.msg, error.returncode)
    return tuple(arg for arg in error.args if luggage.can_travel(arg))


def _flush_terminal(config: pytest.Config) -> None:
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter._tw.flush()
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(Exception):
            stream.flush()  # type: ignore[union-attr]
