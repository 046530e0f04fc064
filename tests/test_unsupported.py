"""What a host cannot give is said before the first test, keyword by keyword, with the cure; the
tests that need it are in error or skipped, and the others run."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.audit import Snapshot
from tests.conftest import command_line

CGROUP = ("memory", "swap", "pids", "cpus", "cpuset", "io")
KEYWORDS = {
    "memory": "memory='64M'",
    "swap": "memory='64M', swap=0",
    "pids": "pids=20",
    "cpus": "cpus=1",
    "cpuset": "cpuset='0'",
    "io": "io={'wbps': '10M'}",
    "uptime": "uptime='50d'",
    "userns": "userns=True",
    "disk": "disk='10M'",
    "read_only": "read_only=True",
    "network": "network='isolated'",
}
HOSTS = {
    "no cgroups": (
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup; exec "$@"', "sh"],
        CGROUP,
        "= cannot be kept: no cgroup can be written: none is mounted; .*docker run --privileged",
    ),
    "read-only cgroups": (
        [
            *("unshare", "-m", "sh", "-c"),
            'for each in /sys/fs/cgroup/*/; do mount -o remount,bind,ro $each; done; exec "$@"',
            "sh",
        ],
        CGROUP,
        "= cannot be kept: no cgroup can be written: those mounted are read-only or another user's",
    ),
    "no CAP_SYS_TIME": (
        ["setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time"],
        ("uptime",),
        "uptime=.*--cap-add SYS_TIME",
    ),
    "a masked /proc": (
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc/irq; exec "$@"', "sh"],
        ("userns",),
        "userns=True: .*systempaths=unconfined",
    ),
}
"""A prefix that makes this host poorer, the keywords that it then lacks, and what is said."""


def source() -> str:
    text = "import pytest\n"
    for name, value in KEYWORDS.items():
        text += f"\n@pytest.mark.sandbox({value})\ndef test_{name}(nsbox_container):\n"
        text += "    nsbox_container.run(['true'], check=True)\n"
    return (
        text
        + "\n@pytest.mark.sandbox\ndef test_inside():\n    pass\n\ndef test_plain():\n    pass\n"
    )


def run_on(host: str, pytester: pytest.Pytester, *options: str) -> str:
    done = subprocess.run(
        [*HOSTS[host][0], *command_line(), "-rA", *options],
        cwd=pytester.path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "INTERNALERROR" not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("choice", "word"), [("error", "ERROR"), ("skip", "SKIPPED")])
@pytest.mark.parametrize("host", HOSTS)
def test_only_what_needs_it_is_hit_and_is_named_before(
    pytester: pytest.Pytester, host: str, choice: str, word: str, nothing_left: Snapshot
) -> None:
    pytester.makepyfile(test_it=source())
    _, lacking, reason = HOSTS[host]
    output = run_on(host, pytester, f"--nsbox-unsupported={choice}", "-vv")
    header = re.split(r"^test_it.py::", output, maxsplit=1, flags=re.M)[0]
    for name in lacking:
        assert f"\n  test_it.py::test_{name}\n" in header
    assert re.search(reason, header)
    said = re.findall(r"^nsbox: (\d+) tests? cannot run here, and will be (.*?)[ :]", header, re.M)
    assert sum(int(count) for count, _ in said) == len(lacking)
    assert {how for _, how in said} == {"in" if choice == "error" else "skipped"}
    passed = set(re.findall(r"^PASSED test_it.py::test_(\w+)", output, re.M))
    assert passed == {*KEYWORDS, "inside", "plain"} - set(lacking)
    assert len(re.findall(rf"^{word} ", output, re.M)) == len(lacking)


def test_of_many_only_some_are_named(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.sandbox(memory="64M")
        @pytest.mark.parametrize("n", range(9))
        def test_memory(n, nsbox_container): pass
        """
    )
    output = run_on("no cgroups", pytester)
    assert "nsbox: 9 tests cannot run here" in output
    assert "  test_it.py::test_memory[4]\n  and 4 more; all of them with -v\n" in output


def test_on_a_host_that_has_all_nothing_is_said(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=source())
    done = subprocess.run(command_line(), cwd=pytester.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "cannot run here" not in done.stdout


@pytest.mark.parametrize("host", HOSTS)
def test_what_tests_may_ask_for_as_they_run_is_said_where_one_may(
    pytester: pytest.Pytester, host: str
) -> None:
    pytester.makepyfile(
        test_plain="def test_it(nsbox_container): pass",
        test_factory="def test_it(nsbox_container_factory): pass",
        test_spec="""
        import pytest

        @pytest.fixture
        def nsbox_spec(): return {}

        def test_it(nsbox_container): pass
        """,
    )
    _, lacking, _ = HOSTS[host]
    names = [f"{name}=" for name in KEYWORDS if name in lacking and name != "swap"]
    assert "not here" not in run_on(host, pytester, "test_plain.py")
    for file in ("test_factory.py", "test_spec.py"):
        output = run_on(host, pytester, file)
        before = output.split(f"\n{file} ")[0]
        (said,) = re.findall("nsbox: not here, should .* it runs: (.*?=): (.*)", before)
        assert sorted(said[0].split(", ")) == sorted(names)
        assert re.search("docker run --privileged|--cap-add SYS_TIME|systempaths", said[1])


def test_workers_say_it_once_before_the_tests_and_among_the_warnings(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(test_it=source())
    output = run_on("no cgroups", pytester, "-p", "xdist.plugin", "-n2", "-W", "error")
    before, after = re.split(r"^=+ ERRORS =+$", output, maxsplit=1, flags=re.M)
    for text in (before, after.partition(" warnings summary ")[2]):
        assert len(re.findall("nsbox: 1 test cannot run here", text)) == len(CGROUP) - 2
        assert text.count("nsbox: 2 tests cannot run here, ") == 1  # memory and swap
    assert " 5 warnings, " in output
