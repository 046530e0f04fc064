"""Every step of a session fails once, in each way that is plausible for it.

A step is one that `tests.faulty` knows. After each: the error that is raised says what failed and
on what, everything is undone, and the session, or where there is none the next, makes containers.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_nsbox import Container, NsboxError, Session
from pytest_nsbox.launcher import ledger
from tests import faulty
from tests.audit import awake, take

SPEC: dict[str, Any] = {"memory": "64M", "pids": 20, "cpus": 1}
HERE = Path(__file__).parent.parent.parent
_SOON = 5.0  # seconds in which what has been killed goes
_NEVER = 1 << 30

Fault = tuple[int, str, str]  # errno, kind, object


@dataclass
class Tally:
    """What has been tried and what was wrong, by stage."""

    tried: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def table(self) -> Iterator[str]:
        row = "{:26} {:>6} {:>7} {:>12}".format
        yield row("a step fails in", "faults", "raised", "left behind")
        for stage in self.tried:
            yield row(stage, self.tried[stage], self.raised[stage], len(self.wrong[stage]))
        wrong = sum(map(len, self.wrong.values()))
        yield row("all", self.tried.total(), self.raised.total(), wrong)


@contextlib.contextmanager
def faulty_launchers() -> Iterator[faulty.Plan]:
    """Sessions started within have a launcher whose steps fail as told."""
    start = subprocess.Popen.__init__

    def start_faulty(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        if "pytest_nsbox.launcher" in args:
            own = args[args.index("pytest_nsbox.launcher") + 1 :]
            args = [sys.executable, "-P", "-m", "tests.faulty", *own]
        start(self, args, *rest, **options)

    with tempfile.NamedTemporaryFile() as file:
        os.environ[faulty.FILE] = file.name
        os.environ["PYTHONPATH"] = str(HERE)
        subprocess.Popen.__init__ = start_faulty  # type: ignore[method-assign]
        try:
            yield faulty.Plan(file.name)
        finally:
            subprocess.Popen.__init__ = start  # type: ignore[method-assign]


class Stage:
    """One part of a session's life, gone through again and again."""

    name = ""
    who: tuple[int, ...] = (faulty.LAUNCHER,)

    def __init__(self, plan: faulty.Plan) -> None:
        self.plan = plan

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """What all its trials have in common."""
        yield

    def trial(self, who: int, k: int, choose: int) -> tuple[Fault | None, list[str], str | None]:
        """Go through it, the k-th step failing: the fault, what was wrong, the error raised."""
        raise NotImplementedError

    def make_ahead(self, session: Session, inits: int, containers: int) -> list[str]:
        """Have the launcher make these while nobody waits for them; what was wrong with that."""
        spare = 5
        self.plan.ahead = inits + spare * bool(inits), containers + spare * bool(containers)
        deadline = time.monotonic() + _SOON
        while max(self.plan.ahead) > spare and time.monotonic() < deadline:
            session.describe()  # which wakes it
        for _ in range(3):
            session.describe()
        left, self.plan.ahead = self.plan.ahead, (0, 0)
        if left != (spare * bool(inits), spare * bool(containers)):
            return [f"made ahead, of {spare} more than wanted are left: {left}"]
        return []

    def steps(self, who: int) -> int:
        """How many there are when none fails."""
        self.trial(who, _NEVER, 0)
        return self.plan.steps


def said(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def misnamed(fault: Fault | None, text: str | None) -> list[str]:
    """An error has to name the object of the step that has failed, and the reason."""
    if fault is None or text is None:
        return []
    number, kind, what = fault
    if what and what not in text and os.strerror(number) not in text:
        return [f"not named: {kind} {what}: {os.strerror(number)}: {text!r}"]
    return []


class Build(Stage):
    """A container, in a session that has made some."""

    name = "building"
    who = (faulty.LAUNCHER, faulty.ZYGOTE, faulty.INIT)
    ahead = 0, 0  # inits and containers

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with Session(pool=self.ahead[1]) as self.session:
            self.session.container(**SPEC).close()
            self.make_ahead(self.session, *self.ahead)
            self.session.container(**SPEC).close()
            assert self.session._launcher is not None
            self.launcher = self.session._launcher.pid
            self.descriptors = self.held()
            yield

    def held(self) -> tuple[int, ...]:
        """Descriptors of the launcher and its children."""
        children = Path(f"/proc/{self.launcher}/task/{self.launcher}/children").read_text().split()
        children.pop()  # the janitor opens a directory for each level that it removes
        return tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in (self.launcher, *children))

    def left(self) -> list[str]:
        """What the session has of containers, of which there are none."""
        found = []
        if self.held() > self.descriptors:
            found.append(f"descriptors: {self.held()} instead of {self.descriptors}")
        name = next(Path("/run/nsbox").glob(f"*-{self.launcher}-*")).name
        for path, directories, _ in os.walk("/sys/fs/cgroup"):
            if path.endswith(f"nsbox-{name}"):
                found += [f"cgroup {path}/{each}" for each in directories]
        layers = Path(ledger.cache_directory(), "writable")
        found += [f"layer {path}" for path in layers.glob(f"{name}-*")]
        return found

    def left_for_good(self, before: Collection[str] = ()) -> list[str]:
        found = set()
        for _ in awake(_SOON):
            if not (found := set(self.left()) - set(before)):
                break
            time.sleep(0.01)  # the end of a stranger's child has no event
        return sorted(found)

    def usable(self) -> list[str]:
        """Whether the session is as good as new."""
        wrong = []
        try:
            with self.session.container(**SPEC) as container:
                if container.ip != "172.27.0.2":
                    wrong.append(f"the address is {container.ip}")
                container.run(["true"], check=True)
        except (NsboxError, OSError) as error:
            wrong.append(f"not usable: {said(error)}")
        return wrong + self.left_for_good()

    def trial(self, who: int, k: int, choose: int) -> tuple[Fault | None, list[str], str | None]:
        text = None
        self.plan.arm(who, k, choose)
        wrong = self.make_ahead(self.session, *self.ahead)
        try:
            container = self.session.container(**SPEC)
        except NsboxError as error:
            fault, text = self.plan.disarm(), said(error)
        else:
            fault = self.plan.disarm()
            container.close()
        return fault, wrong + misnamed(fault, text) + self.usable(), text


class ForkAhead(Build):
    """The same where its init is forked, in namespaces of its own, before it is asked for."""

    name = "with its init ahead"
    ahead = 1, 0


class BuildAhead(Build):
    """The same where it is made before it is asked for."""

    name = "made ahead"
    ahead = 0, 1


class TakeDown(Build):
    """The same container, taken down."""

    name = "taking down"
    who = (faulty.LAUNCHER,)
    footings = 0

    def trial(self, who: int, k: int, choose: int) -> tuple[Fault | None, list[str], str | None]:
        text = None
        before = self.left()
        container = self.session.container(**SPEC)
        self.plan.footings = self.footings
        self.plan.arm(who, k, choose)
        try:
            container.close()
        except NsboxError as error:
            text = said(error)
        fault = self.plan.disarm()
        wrong = misnamed(fault, text)
        if self.plan.footings:
            wrong.append("no footing was made ahead")
        wrong += self._goes_on()
        left = self.left_for_good(before)
        if text is not None:
            left = [line for line in left if not line.startswith(("cgroup ", "layer "))]
        return fault, wrong + left, text

    def _goes_on(self) -> list[str]:
        """What could not be removed is left to the end of the session, and hinders nobody."""
        try:
            with self.session.container(**SPEC) as container:
                container.run(["true"], check=True)
        except (NsboxError, OSError) as error:
            return [f"not usable: {said(error)}"]
        return []


class TakeDownAhead(TakeDown):
    """The same, while what the next one stands on is made."""

    name = "with a footing made ahead"
    footings = 1


class Begin(Stage):
    """The start of a session: its ledger, its hub, what inits are forked from."""

    name = "starting a session"
    who = (faulty.LAUNCHER, faulty.ZYGOTE)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        self.before = take()
        yield

    def gone(self) -> list[str]:
        """Nothing is left, if need be after a sweep, and the next session works."""
        wrong = []
        try:
            with Session() as after, after.container(**SPEC) as container:
                container.run(["true"], check=True)
        except (NsboxError, OSError) as error:
            wrong.append(f"the next session: {said(error)}")
        try:
            self.before.must_equal_soon(_SOON)
        except AssertionError as error:
            wrong += str(error).splitlines()[1:]
            self.before = take()
        return wrong

    def trial(self, who: int, k: int, choose: int) -> tuple[Fault | None, list[str], str | None]:
        text = None
        self.plan.arm(who, k, choose)
        session = Session()
        try:
            session.describe()
        except NsboxError as error:
            text = said(error)
        fault = self.plan.disarm()
        wrong = misnamed(fault, text)
        with contextlib.suppress(NsboxError):  # the launcher may have ended at once
            session.close()
        return fault, wrong + self.gone(), text


class First(Begin):
    """The first container of a session: the bridge, and the way out."""

    name = "the first container"
    who = (faulty.LAUNCHER, faulty.ZYGOTE)

    def trial(self, who: int, k: int, choose: int) -> tuple[Fault | None, list[str], str | None]:
        text = None
        with ExitStack() as stack:
            session = stack.enter_context(Session())
            session.describe()
            self.plan.arm(who, k, choose)
            wrong = []
            try:
                session.container(**SPEC).close()
            except NsboxError as error:
                text = said(error)
            fault = self.plan.disarm()
            wrong += misnamed(fault, text)
            try:
                with session.container(**SPEC) as container:
                    container.run(["true"], check=True)
            except (NsboxError, OSError) as error:
                wrong.append(f"not usable: {said(error)}")
            try:
                session.close()
            except NsboxError as error:
                wrong.append(f"the end: {said(error)}")
        return fault, wrong + self.gone(), text


class End(Begin):
    """The end of a session with a container that nobody has closed."""

    name = "ending a session"
    who = (faulty.LAUNCHER,)
    ahead = 0, 0
    footings = 0

    def trial(self, who: int, k: int, choose: int) -> tuple[Fault | None, list[str], str | None]:
        text = None
        session = Session(pool=self.ahead[1])
        self.plan.footings = self.footings
        if self.footings:
            session.container(**SPEC).close()
        container: Container = session.container(**SPEC)
        container._init.close()
        os.close(container.pidfd)
        wrong = self.make_ahead(session, *self.ahead)
        self.plan.arm(who, k, choose)
        try:
            session.close()
        except NsboxError as error:
            text = said(error)
        fault = self.plan.disarm()
        return fault, wrong + misnamed(fault, text) + self.gone(), text


class EndAhead(End):
    """The same with one that nobody has asked for, and an init that has nothing to do yet."""

    name = "ending one made ahead"
    ahead = 1, 1


class EndUnused(End):
    """The same with what another container would have stood on."""

    name = "ending with a footing ahead"
    footings = 1


STAGES = (
    Begin,
    First,
    Build,
    ForkAhead,
    BuildAhead,
    TakeDown,
    TakeDownAhead,
    End,
    EndAhead,
    EndUnused,
)


def go_through(
    stage_class: type[Stage],
    tally: Tally,
    *,
    sample: int | None = None,
    seed: int = 1,
    tell: Callable[[str], object] = lambda line: None,
) -> None:
    """Every fault of a stage; of each who fails, `sample` of them where that is given."""
    dice = random.Random(seed)
    name = stage_class.name
    tally.wrong.setdefault(name, [])
    with faulty_launchers() as plan:
        stage = stage_class(plan)
        with stage.ready():
            for who in stage.who:
                count = stage.steps(who)
                ks = sorted(dice.sample(range(1, count + 1), min(sample or count, count)))
                for k in ks:
                    choose, choices = (dice.randrange(60) if sample else 0), 1
                    while choices:
                        choices -= 1
                        try:
                            fault, wrong, text = stage.trial(who, k, choose)
                        except NsboxError as error:  # what was to be there before
                            fault = plan.disarm() or (0, "nothing", "")
                            wrong, text = [f"no trial: {said(error)}"], None
                        if fault is None:
                            break
                        tally.tried[name] += 1
                        tally.raised[name] += text is not None
                        what = f"{name}, {faulty.WHO[who]}, step {k} of {count}"
                        number, kind, on = fault
                        for line in wrong:
                            line = f"{what}, {kind} {on}: {os.strerror(number)}: {line}"
                            tally.wrong[name].append(line)
                            tell(line)
                        if kind == "nothing":
                            break
                        if not sample and not choose:
                            choices = len(faulty.PLAUSIBLE[kind]) - 1
                        choose += 1
