"""The command `nsbox`: a container for one command, and what sessions keep on disk."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pytest_nsbox.errors import NsboxError
from pytest_nsbox.model.units import format_size, parse_duration


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return int(options.run(options))
    except NsboxError as error:
        print(f"nsbox: {error}", file=sys.stderr)
        return 125
    except OSError as error:
        print(f"nsbox: {error}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nsbox", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a command in a container",
        description="Run a command in a container of its own. The exit status is the command's; "
        "125: no container; 126, 127: the command cannot be run, is not there.",
    )
    run.add_argument("--rootfs", default="host", help="where its files come from (default: host)")
    run.add_argument("--network", default="nat", help="nat, isolated, none or host (default: nat)")
    run.add_argument("--memory", help="limit, as 256M")
    run.add_argument("--cpus", type=float, help="limit, in cores")
    run.add_argument("--pids", type=int, help="limit, in processes and threads")
    run.add_argument("--disk", help="limit on what it writes, as 64M")
    run.add_argument("--hostname", help="its name")
    run.add_argument("--user", help="who runs the command: a name, an id, or uid:gid")
    run.add_argument("--cwd", help="where the command starts")
    run.add_argument("--privileged", action="store_true", help="without confinement")
    run.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    run.set_defaults(run=_run)

    doctor = commands.add_parser(
        "doctor",
        help="try what this host can give to containers, and say how to cure what is missing",
        description="Try each facility in namespaces of its own and leave nothing. The exit status "
        "is 0 when all that a test without keywords needs works, else 1.",
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)

    gc = commands.add_parser("gc", help="remove what killed sessions have left")
    gc.add_argument(
        "--check",
        action="store_true",
        help="remove nothing; list what there is, and exit with 1 if a dead session has left any",
    )
    gc.set_defaults(run=_gc)

    cache = commands.add_parser("cache", help="unpacked images")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="what there is, and when it was last used")
    listed.set_defaults(run=_cache_list)
    prune = actions.add_parser("prune", help="remove what no session uses")
    prune.add_argument(
        "--unused-for", default="0s", metavar="DURATION", help="only what was not used for so long"
    )
    prune.set_defaults(run=_cache_prune)
    return parser


def _run(options: argparse.Namespace) -> int:
    from pytest_nsbox.session.session import Session

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise NsboxError("no command given: nsbox run [OPTIONS] -- COMMAND [ARG...]")
    names = "rootfs network memory cpus pids disk hostname user cwd privileged".split()
    keywords: dict[str, Any] = {name: getattr(options, name) for name in names}
    with Session() as session, session.container(**keywords) as container:
        result = container.run(
            command,
            stdin=sys.stdin.fileno(),
            stdout=sys.stdout.fileno(),
            stderr=sys.stderr.fileno(),
        )
        if result.oom_killed:
            print(f"nsbox: {container.death()}", file=sys.stderr)
    return result.returncode if result.returncode >= 0 else 128 - result.returncode


def _doctor(options: argparse.Namespace) -> int:
    if sys.platform != "linux":
        from pytest_nsbox.session.session import check_host

        check_host()
    from pytest_nsbox.doctor import table

    with _book() as (name, record):
        findings = table.examine(name, record)
    if options.json:
        print(json.dumps(table.as_data(findings), indent=2))
    else:
        print(table.as_text(findings, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return table.status(findings)


@contextlib.contextmanager
def _book() -> Iterator[tuple[str, Callable[[str], None]]]:
    """Where the cgroups that are made for a trial are written down, and what they are named after:
    who is killed over it leaves them to `nsbox gc`."""
    from pytest_nsbox.launcher import ledger

    try:
        book = ledger.Ledger(ledger.state_directory())
    except OSError as error:
        why = f"what is made cannot be written down: {error}"

        def refuse(path: str) -> None:
            raise NsboxError(why)

        yield "", refuse
        return
    try:
        yield book.name, lambda path: book.record(ledger.CGROUP, path)
    finally:
        book.close()


def _gc(options: argparse.Namespace) -> int:
    from pytest_nsbox.launcher import audit, ledger

    if options.check:
        found = audit.audit(ledger.cache_directory())
        for each in found:
            print(f"{'in use' if each.alive else 'left'}: {each}")
        return 1 if audit.left(found) else 0
    from pytest_nsbox.launcher.standing import take_standing

    state = ledger.state_directory()
    take_standing()  # what containers have written may be another's than the user's
    for line in ledger.sweep_all(state, ledger.cache_directory()):
        print(f"removed {line}")
    return 0


def _cache() -> Any:
    from pytest_nsbox.launcher import ledger
    from pytest_nsbox.launcher.standing import take_standing
    from pytest_nsbox.rootfs import LayerCache

    cache = ledger.cache_directory()
    return LayerCache(cache / take_standing().cache_name)


def _cache_list(options: argparse.Namespace) -> int:
    for entry in _cache().entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(f"{entry.name}  {format_size(entry.size):>10}  last used {used}  {entry.source}")
    return 0


def _cache_prune(options: argparse.Namespace) -> int:
    for name in _cache().prune(parse_duration(options.unused_for)):
        print(f"removed {name}")
    return 0
