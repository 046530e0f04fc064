"""A session without pytest that does all there is to do, until it is killed or done."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from pytest_nsbox import Session

_LONGER = 1.0  # seconds that it lives on after the moment of the kill, which it may survive


def live(session: Session) -> None:
    with (
        session.network(internet=False) as lan,
        session.container(memory="64M", pids=50) as one,
        session.container(networks=[lan], disk="8M") as two,
        session.container(userns=True) as three,
    ):
        for container in (one, two, three):
            container.write_text("/etc/written", "x")
            container.popen("setsid sleep 1000 & sleep 1000", shell=True)
            container.run(["true"], check=True)
        one.popen(["python3", "-S", "-m", "http.server", "80"])
        one.publish(80)
        one.pause()
        two.call(os.getpid)
        one.unpause()


def eat() -> None:
    kept = []
    while True:
        kept.append(bytearray(16 << 20))


def main(kind: str, delay: float, pool: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ends = {
        "os._exit": lambda: os._exit(3),
        "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "out of memory": eat,
    }
    if "NSBOX_CHAOS_PLANT" in os.environ:
        command = [sys.executable, "-P", "-m", "tests.chaos.plant"]
        monkey = subprocess.Popen.__init__

        def start(self: Any, args: Any, *rest: Any, **options: Any) -> None:
            if "pytest_nsbox.launcher" in args:
                args = [*command, *args[args.index("pytest_nsbox.launcher") + 1 :]]
            monkey(self, args, *rest, **options)

        subprocess.Popen.__init__ = start  # type: ignore[method-assign]
    if kind in ends:
        timer = threading.Timer(delay, ends[kind])
        timer.daemon = True
        timer.start()
    until = time.monotonic() + delay + _LONGER
    with Session(pool=pool) as session:
        # with a leak planted the kill comes when there has been time for it, however fast this is
        while "NSBOX_CHAOS_PLANT" in os.environ or time.monotonic() < until:
            live(session)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
