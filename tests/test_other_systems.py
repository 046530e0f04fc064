"""Where there is no Linux the plugin loads, stays quiet, and says what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

# the C library there has no prctl, unshare and the like, so that libc cannot be imported
ABSENT = {
    "darwin": "pytest_nsbox.kernel.libc",
    "win32": "pytest_nsbox.kernel.libc fcntl resource pwd grp termios",
}
START = """
import sys, os
absent = {absent!r}.split()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import pytest, _pytest.pytester, _pytest.faulthandler
for name in absent:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse())
for name in "setns unshare memfd_create pidfd_open geteuid getuid".split():
    if {system!r} == "win32" or not name.startswith("get"):
        vars(os).pop(name, None)
sys.platform = {system!r}
sys.exit(pytest.main(["-s", "-p", "no:cacheprovider", "-p", "no:tmpdir", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("system", "cure"), [("darwin", "Lima"), ("win32", "WSL 2")])
def test_the_plugin_is_quiet_until_it_is_used_and_then_says_what_to_do(
    pytester: pytest.Pytester, system: str, cure: str
) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_plain(): pass
        def test_beside(nsbox_container): pass

        @pytest.mark.sandbox(memory="64M")
        def test_inside(): pass
        """
    )
    script = START.format(absent=ABSENT[system], system=system)
    for options, outcome in (
        (["--nsbox-unsupported=error"], "1 passed, 2 errors"),
        (["--nsbox-unsupported=skip", "-rs"], "1 passed, 2 skipped"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *options],
            cwd=pytester.path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert outcome in done.stdout, done.stdout + done.stderr
        assert f"containers need Linux, this is {system}" in done.stdout
        assert cure in done.stdout
        if "errors" in outcome:  # pytest says where a skip comes from
            assert "pytest_nsbox/" not in done.stdout, done.stdout
