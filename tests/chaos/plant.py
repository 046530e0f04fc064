"""A launcher that leaks on purpose: what it leaves has to be found."""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    kinds = set(os.environ["NSBOX_CHAOS_PLANT"].split())
    missing = set(kinds)
    from pytest_nsbox.launcher.ledger import Ledger

    record = Ledger.record

    def forget(self: Ledger, made: str, value: object) -> None:
        if "process" in missing and os.fork() == 0:
            os.setsid()
            os.closerange(0, 1000)
            os.execlp("sleep", "sleep", "1000")
        if made not in kinds:
            record(self, made, value)
        elif made == "layer":
            os.makedirs(f"{value}-planted", exist_ok=True)
        elif made == "cgroup":
            os.makedirs(str(value), exist_ok=True)
        missing.difference_update((made, "process"))
        if not missing:
            open(os.environ["NSBOX_CHAOS_PLANTED"], "w").close()

    Ledger.record = forget  # type: ignore[method-assign]
    sys.argv[0] = "pytest_nsbox.launcher"
    runpy.run_module("pytest_nsbox.launcher", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
