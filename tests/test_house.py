"""Imports run down only, and what is outside's stays behind its one door."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pytest_nsbox"

BELOW = {
    "errors": set(),
    "model": {"errors"},
    "kernel": {"errors", "model"},
    "wire": {"errors"},
    "rootfs": {"errors", "model"},
    "init": {"wire", "kernel", "model", "errors"},
    "launcher": {"init", "wire", "rootfs", "model", "kernel", "errors"},
    # a function that runs inside is a fork of the test process: init.enter is its door
    "session": {"wire", "rootfs", "model", "errors", "init"},
    "plugin": {"session", "rootfs", "model", "errors"},
    "doctor": {"kernel", "model", "errors"},
    "cli": {"doctor", "session", "launcher", "rootfs", "model", "errors"},
    "__init__": {"session", "model", "errors"},
}
DOORS = {
    "pytest": {"plugin"},
    "_pytest": {"plugin"},
    "pyroute2": {"kernel"},
    "ctypes": {"kernel/libc.py"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down(path: Path) -> None:
    place = path.relative_to(PACKAGE)
    room = place.parts[0].removesuffix(".py")
    for module in imports(path):
        top, *rest = module.split(".")
        if (
            top == "pytest_nsbox"
            and rest
            and (PACKAGE / rest[0]).exists() | (PACKAGE / f"{rest[0]}.py").exists()
        ):
            assert rest[0] in BELOW[room] | {room}, f"{place} imports {module}"
            if (room, rest[0]) == ("session", "init") and len(rest) > 1:
                assert rest[1] == "enter", f"{place} imports {module}"
        for door in DOORS.get(top, [str(place)]):
            assert str(place).startswith(door) or top not in DOORS, f"{place} imports {module}"


def test_the_plugin_alone_imports_nothing_heavy() -> None:
    script = "import pytest, sys; before = set(sys.modules); import pytest_nsbox.plugin; "
    script += "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "pytest_nsbox.plugin" in loaded, done.stderr
    for heavy in ("pyroute2", "ctypes", "pytest_nsbox.session", "pytest_nsbox.rootfs"):
        assert heavy not in loaded


def test_a_session_never_imports_pyroute2() -> None:
    script = "import pytest_nsbox, sys; s = pytest_nsbox.Session(); s.__enter__(); "
    script += "s.container().call(int); s.close(); print('pyroute2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_launcher_imports_the_messages_of_pyroute2_and_no_more() -> None:
    script = """
        import sys
        from pytest_nsbox.kernel.netlink import import_only_messages
        import_only_messages()
        import pytest_nsbox.launcher.server
        print(*(name for name in sys.modules if name.startswith("pyroute2.")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    imported = done.stdout.split()
    assert "pyroute2.netlink.rtnl.ifinfmsg" in imported
    assert "pyroute2.ndb" not in imported
    assert "pyroute2.iproute" not in imported
