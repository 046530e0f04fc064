"""Sections about one container: made, used, taken down."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from report import FLOOR, Case, Goal, Section, Times, ratio, timed
from workbench import BWRAP, CRUN, LIMITS, OURS, ROOT, Bench

from pytest_nsbox import Session

POOL = 4  # the plugin's default
_RUN, _HOST_RUN = 'container.run(["true"])', 'subprocess.run(["true"])'
_ASKED = (
    "A command is a child of PID 1: that has to wake and read what is asked for, wake again at the "
    "command's end, and wake the test process, which on the host waits for a child of its own. The "
    "trace of a command is below."
)
_COLD = "The first trace below has where the time goes, the section before whose it is."
_STACKED = (
    "The kernel has each of the layers to look at, as it mounts them and as a file is looked for: "
    "`bench/trace.py --rootfs IMAGE` has it step by step."
)
_WIRED = "veth on a bridge, address, route, NAT; overlay on /; seccomp; capabilities"


def _lives(bench: Bench) -> list[Case]:
    limited = f"6 namespaces; cpu, memory, pids limits; {_WIRED}"
    unlimited = f"6 namespaces; control groups, unlimited; {_WIRED}"
    lone = "as the first, with the loopback only"
    return [
        Case(OURS, bench.life(bench.cold, **LIMITS), limited),
        Case(f"{OURS}, no limits", bench.life(bench.cold), unlimited),
        Case(f'{OURS}, network="none"', bench.life(bench.cold, network="none", **LIMITS), lone),
        *map(bench.peer, bench.peers),
    ]


def _against_crun(bench: Bench, how: str) -> Goal:
    what = f"cold, {how}: {OURS} / {CRUN}"
    missing = bench.missing.get(CRUN, "")
    return Goal(what, 1, ratio(OURS, CRUN), without=missing, hindrance=_COLD)


def create(bench: Bench) -> Section:
    return Section(
        "Create, run `true`, destroy: back to back",
        "One container's whole life, from the call that makes it to the return of the call "
        "that has taken it down; the session is open already, as it is in a test run, and makes "
        "no container ahead, only what any next one begins with: once one has been made, a process "
        "in namespaces of its own, with `/proc`, `/sys` and `/dev`; and, while one ends, an empty "
        "control group and an empty directory for the next. Turns are taken in another order each "
        "time. Every case is run twice in a row, and the second run counts: a network namespace is "
        "taken down by the kernel in the background, and the next creation waits for it. The peers "
        "are started by posix_spawn(3) from a small process, and their time ends with their exit. "
        "crun has the configuration that `crun spec` writes, with the same limits. The floor "
        "program is `bench/floor.py`: the system calls of a container, as few as can be, one after "
        "the other.",
        _lives(bench),
        CRUN,
        bench.runs * 3,
        bench.floor,
        settle=True,
        goals=[_against_crun(bench, "back to back")],
        remarks=bench.remarks(),
    )


def paused(bench: Bench) -> Section:
    return Section(
        "Create, run `true`, destroy: 100 ms apart",
        "The same, with a pause of 100 ms before each, since tests are not back to back: "
        "the first attach to a control group and the first new namespaces after a while are "
        "slower, for everyone.",
        _lives(bench),
        CRUN,
        max(2, bench.runs // 2),
        bench.floor,
        pause=0.1,
        goals=[_against_crun(bench, "100 ms apart")],
    )


def engines(bench: Bench) -> Section:
    found = [bench.peer(engine) for engine in bench.engines]
    missing = bench.missing_engines | {
        name: why for name, why in bench.missing.items() if name.endswith("run --rm")
    }
    without = "; ".join(f"{name}: {why}" for name, why in missing.items())
    base = found[0].name if found else FLOOR

    def faster(times: Times) -> float | None:
        if not found:
            return None
        return statistics.median(times[base]) / statistics.median(times[OURS])

    what = f"cold: {base if found else 'docker run --rm, or podman run --rm'} / {OURS}"
    return Section(
        "Create, run `true`, destroy: beside Docker and podman",
        "The engines with the same limits, and an image that is nothing but busybox, imported "
        "for it.",
        [Case(OURS, bench.life(bench.cold, **LIMITS), f"limits; {_WIRED}"), *found],
        base,
        max(2, bench.runs // 4),
        bench.floor,
        settle=True,
        goals=[
            Goal(
                what,
                40,
                faster,
                least=True,
                without=f"not measured here: {without}",
                hindrance=_COLD,
            )
        ],
    )


def warm(bench: Bench) -> Section:
    session = bench.session(bench.stack, POOL)
    name = f"{OURS}, pool={POOL}: until the result"
    return Section(
        "From the request to the first command's result, with a pool",
        f"As a test sees it that takes the fixture and runs `true`: with `pool={POOL}`, the "
        "plugin's default, containers are made ahead while tests run; each is given out once. "
        "There are 20 ms before each case, as if tests took so long, each case is run twice and "
        "the second run counts. bwrap's time ends with its exit. The container is taken down "
        "after the result, which is not in the figure, but has to be done before the next.",
        [
            Case(name, first_result(session), f"limits; {_WIRED}"),
            Case(f"{OURS}, pool=0: until the result", first_result(bench.cold), "the same"),
            *bench.peer_named(BWRAP),
        ],
        BWRAP,
        bench.runs,
        bench.floor,
        settle=True,
        pause=0.02,
        goals=[
            Goal(
                f"warm: request to first result / {BWRAP}",
                1,
                ratio(name, BWRAP),
                without=bench.missing.get(BWRAP, ""),
            )
        ],
    )


def first_result(session: Session) -> Callable[[], float]:
    """From the request to the first command's result."""

    def once() -> float:
        start = time.perf_counter()
        with session.container(**LIMITS) as container:
            container.run(["true"], check=True)
            return time.perf_counter() - start

    return once


def run(bench: Bench) -> Section:
    running, argv = bench.running(), ["true"]
    return Section(
        "A command in a running container",
        "From call to return, in this one process, the container and its limits as above. "
        "`container.run` captures both outputs, so `subprocess.run` is shown with that, too. "
        "`container.call` forks the calling process, enters the container, runs a Python "
        "function there and returns its result; it grows with the process.",
        [
            Case(_RUN, timed(lambda: running.run(argv, check=True))),
            Case("container.call(int)", timed(lambda: running.call(int))),
            Case(_HOST_RUN, timed(lambda: subprocess.run(argv, check=True))),
            Case(
                'subprocess.run(["true"], capture_output=True)',
                timed(lambda: subprocess.run(argv, check=True, capture_output=True)),
            ),
        ],
        _HOST_RUN,
        bench.runs,
        bench.floor,
        settle=True,
        goals=[Goal(f"{_RUN} / {_HOST_RUN}", 1.5, ratio(_RUN, _HOST_RUN), hindrance=_ASKED)],
    )


LAYERS = 30


def image(bench: Bench) -> Section:
    sys.path.insert(0, str(ROOT))
    from tests.images import Images

    deep = Images(bench.directory / "images").layered(LAYERS)
    host, layered = f"{OURS} on the host's root", f"{OURS} on {LAYERS} layers"
    return Section(
        "From an image of many layers",
        f"Create, run `true`, destroy, as above: on the host's root, and on an image of {LAYERS} "
        "layers, unpacked before. Its `true` is busybox.",
        [
            Case(layered, bench.life(bench.cold, rootfs=str(deep), **LIMITS)),
            Case(host, bench.life(bench.cold, **LIMITS)),
        ],
        host,
        bench.runs,
        bench.floor,
        settle=True,
        goals=[
            Goal(
                f"an image of {LAYERS} layers / the host's root",
                1.2,
                ratio(layered, host),
                hindrance=_STACKED,
            )
        ],
    )
