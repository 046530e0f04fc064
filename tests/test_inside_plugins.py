"""Other plugins with a body inside: each test runs the real one."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_inside import normal

Run = Callable[..., pytest.RunResult]


@pytest.mark.parametrize("distribution", ["load", "loadscope"])
def test_xdist(run_pytest: Run, distribution: str) -> None:
    result = run_pytest(
        """
        import os, warnings, pytest

        @pytest.fixture(scope="class")
        def wide():
            return os.getpid()

        class TestOne:
            @pytest.mark.parametrize("n", range(4))
            def test_inside(self, n, wide):
                assert os.getppid() == 0 and os.getpid() != wide

        def test_warns():
            warnings.warn("from inside")

        def test_fails():
            assert 0
        """,
        *("-p", "xdist", "-n2", f"--dist={distribution}", "--nsbox-all"),
    )
    result.assert_outcomes(passed=5, failed=1, warnings=1)


def test_a_timeout_fails_at_the_line_that_took_too_long(run_pytest: Run) -> None:
    source = """
        import time, pytest

        def wait():
            time.sleep(1000)

        @pytest.mark.timeout(1, method="signal")
        def test_slow():
            wait()

        @pytest.mark.timeout(1, method="signal", func_only=True)
        def test_slow_function():
            wait()

        @pytest.mark.timeout(60)
        def test_after(): pass
    """
    result = run_pytest(source, "-p", "pytest_timeout", "--nsbox-all", "--tb=short")
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(["*in wait", "*time.sleep(1000)", "E*Failed: Timeout*"])


def test_a_timeout_by_thread_ends_the_body_with_its_stacks(run_pytest: Run) -> None:
    """Outside, that method ends the whole run."""
    result = run_pytest(
        """
        import threading, time, pytest

        def wait():
            print("captured before")
            time.sleep(1000)

        @pytest.fixture
        def timers():
            yield [one for one in threading.enumerate() if isinstance(one, threading.Timer)]

        @pytest.mark.timeout(1, method="thread")
        def test_slow():
            wait()

        @pytest.mark.timeout(1, method="thread", func_only=True)
        def test_slow_function():
            wait()

        @pytest.fixture
        def slow():
            yield
            wait()

        @pytest.mark.timeout(1, method="thread")
        def test_slow_teardown(slow): pass

        @pytest.mark.timeout(60, method="thread")
        def test_after(timers):
            assert len(timers) == 1
        """,
        *("-p", "pytest_timeout", "--nsbox-all"),
    )
    result.assert_outcomes(failed=2, errors=1, passed=2)
    text = result.stdout.str()
    assert text.count("+ Timeout +") == 6
    assert len(re.findall("line [0-9]+, in wait\n *time.sleep", text)) == 3
    assert text.count("pytest-timeout ended it after 1 s; its stacks are above") == 2


def test_reruns_have_a_container_each(run_pytest: Run, pytester: pytest.Pytester) -> None:
    result = run_pytest(
        """
        import os, pytest

        @pytest.mark.sandbox
        @pytest.mark.flaky(reruns=3)
        def test_it(tmp_path_factory):
            base = tmp_path_factory.getbasetemp()
            assert not os.path.exists("/etc/seen")
            open("/etc/seen", "w").close()
            tries = base / "tries"
            count = int(tries.read_text()) if tries.exists() else 0
            tries.write_text(str(count + 1))
            assert count == 2
        """,
        "-p",
        "pytest_rerunfailures",
        "-rR",
    )
    result.assert_outcomes(passed=1)
    assert result.stdout.str().count("RERUN test_it.py") == 2


def test_only_some_errors_are_rerun(run_pytest: Run) -> None:
    result = run_pytest(
        """
        def test_value(): raise ValueError
        def test_type(): raise TypeError
        """,
        *("-p", "pytest_rerunfailures", "--reruns=2", "--only-rerun=ValueError", "--nsbox-all"),
    )
    assert result.parseoutcomes() == {"failed": 2, "rerun": 2}


@pytest.mark.parametrize("scope", ["function", "module", "session"])
def test_asyncio(run_pytest: Run, scope: str) -> None:
    result = run_pytest(
        f"""
        import asyncio, pytest, pytest_asyncio

        @pytest_asyncio.fixture(scope="{scope}", loop_scope="{scope}")
        async def wide():
            await asyncio.sleep(0)
            yield asyncio.get_running_loop()
            await asyncio.sleep(0)

        @pytest.mark.asyncio(loop_scope="{scope}")
        @pytest.mark.parametrize("n", range(2))
        async def test_it(n, wide):
            assert asyncio.get_running_loop() is wide
            process = await asyncio.create_subprocess_exec("true")
            assert await process.wait() == 0
            server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 80)
            reader, writer = await asyncio.open_connection("127.0.0.1", 80)
            assert await reader.read() == b""
            writer.close()
            server.close()
            await asyncio.to_thread(int)
        """,
        *("-p", "pytest_asyncio.plugin", "--nsbox-all", "-o", "asyncio_mode=strict"),
    )
    result.assert_outcomes(passed=2)


def test_anyio(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import anyio, pytest

        @pytest.fixture(scope="module")
        def anyio_backend():
            return "asyncio"

        @pytest.fixture(scope="module")
        async def wide():
            await anyio.sleep(0)
            yield 1

        @pytest.mark.anyio
        @pytest.mark.parametrize("n", range(2))
        async def test_it(n, wide):
            await anyio.sleep(0.01)
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 0)
            assert wide == 1
        """,
        *("-p", "anyio.pytest_plugin", "--nsbox-all"),
    )
    result.assert_outcomes(passed=2)


def test_mock(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import os

        def test_it(mocker):
            mocker.patch("os.getcwd", return_value="mocked")
            assert os.getcwd() == "mocked"

        def test_after():
            assert os.getcwd() != "mocked"
        """,
        *("-p", "pytest_mock", "--nsbox-all"),
    )
    result.assert_outcomes(passed=2)


def test_the_database_of_hypothesis_survives(run_pytest: Run, pytester: pytest.Pytester) -> None:
    source = """
        from hypothesis import given, settings, strategies as st

        @given(st.integers())
        def test_it(n):
            print("tried", n)
            assert n < 1000
    """
    options = ("-p", "_hypothesis_pytestplugin", "--nsbox-all", "--hypothesis-show-statistics")
    result = run_pytest(source, *options)
    result.assert_outcomes(failed=1)
    assert "n=1000" in result.stdout.str()
    assert "during generate phase" in result.stdout.str()
    assert any((pytester.path / ".hypothesis/examples").iterdir())
    again = run_pytest(source, *options)
    assert "during reuse phase" in again.stdout.str()


def test_randomly_seeds_and_orders_as_outside(run_pytest: Run) -> None:
    source = """
        import random, pytest

        @pytest.mark.parametrize("n", range(6))
        def test_it(n):
            print("drawn", n, random.random())
    """
    options = ("-p", "pytest_randomly", "-s", "-p", "no:cacheprovider", "--randomly-seed=7")
    drawn = [
        re.findall("drawn .*", run_pytest(source, *options, *more).stdout.str())
        for more in ((), ("--nsbox-all",))
    ]
    assert len(drawn[0]) == 6
    assert drawn[0] == drawn[1]


def test_html_has_what_a_body_attaches(run_pytest: Run, pytester: pytest.Pytester) -> None:
    result = run_pytest(
        """
        import pytest_html

        def test_it(extras):
            extras.append(pytest_html.extras.text("attached inside"))
            print("printed inside")
            assert 0
        """,
        *("-p", "pytest_metadata.plugin", "-p", "pytest_html.plugin", "-p", "pytest_html.fixtures"),
        *("--html=report.html", "--self-contained-html", "--nsbox-all"),
    )
    result.assert_outcomes(failed=1)
    page = (pytester.path / "report.html").read_text()
    assert "printed inside" in page
    assert "YXR0YWNoZWQgaW5zaWRl" in page  # "attached inside", in base64


def test_benchmarks_are_counted_outside(run_pytest: Run, pytester: pytest.Pytester) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.parametrize("n", range(2))
        def test_it(benchmark, n):
            benchmark.pedantic(int, rounds=3)
        """,
        *("-p", "pytest_benchmark.plugin", "--nsbox-all", "--benchmark-json=out.json"),
    )
    result.assert_outcomes(passed=2)
    import json

    found = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert [(row["name"], row["stats"]["rounds"]) for row in found] == [
        ("test_it[0]", 3),
        ("test_it[1]", 3),
    ]


def test_a_body_without_a_container_is_one_error_also_to_a_plugin_that_looks_at_fixtures(
    run_pytest: Run,
) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.sandbox(user="nobody")
        def test_it(): pass

        def test_after(): pass
        """,
        *("-p", "pytest_benchmark.plugin", "--nsbox-all"),
    )
    result.assert_outcomes(passed=1, errors=1)


def test_junitxml_is_the_same_as_outside(run_pytest: Run, pytester: pytest.Pytester) -> None:
    source = """
        import pytest

        def test_properties(record_property, record_testsuite_property, record_xml_attribute):
            record_property("of the test", 1)
            record_testsuite_property("of the suite", 2)
            record_xml_attribute("attribute", "value")
            print("printed")

        def test_fails(): assert 0

        def test_skips(): pytest.skip("why")

        @pytest.fixture
        def broken():
            yield
            assert 0

        def test_error(broken): pass
    """

    def xml(*options: str) -> str:
        run_pytest(
            source,
            "--junitxml=out.xml",
            "-o",
            "junit_logging=all",
            "-o",
            "junit_family=xunit1",
            *options,
        )
        text = Path("out.xml").read_text()
        return re.sub(r' (time|timestamp|hostname)="[^"]*"', "", text)

    assert 'attribute="value"' in xml()
    assert xml("--nsbox-all") == xml()


def test_snapshots_are_written_found_and_counted_as_outside(
    run_pytest: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    # compiled code is found by a source's size and second, and these differ in neither
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    source = """
        import pytest
        from syrupy.filters import props
        from syrupy.extensions.single_file import SingleFileSnapshotExtension

        @pytest.mark.parametrize("n", range(2))
        def test_amber(snapshot, n):
            assert [n, VALUE] == snapshot
            assert {"kept": n, "left out": object()} == snapshot(exclude=props("left out"))

        def test_file(snapshot):
            assert b"%d" % VALUE == snapshot.use_extension(SingleFileSnapshotExtension)
    """

    def run(value: int, *options: str) -> tuple[str, list[str], dict[str, bytes]]:
        result = run_pytest(f"VALUE = {value}\n{textwrap.dedent(source)}", "-p", "syrupy", *options)
        found = pytester.path / "__snapshots__"
        files = {str(path): path.read_bytes() for path in found.rglob("*") if path.is_file()}
        summary = [line for line in result.stdout.lines if "snapshot" in line and ".py" not in line]
        return normal(result.stdout.str()), summary, files

    def both(value: int, *options: str) -> tuple[str, list[str], dict[str, bytes]]:
        before = pytester.path / "before"
        shutil.copytree(pytester.path / "__snapshots__", before, dirs_exist_ok=True)
        outside = run(value, *options)
        shutil.rmtree(pytester.path / "__snapshots__", ignore_errors=True)
        before.rename(pytester.path / "__snapshots__")
        inside = run(value, "--nsbox-all", *options)
        assert inside == outside
        return inside

    (pytester.path / "__snapshots__").mkdir()
    assert "5 snapshots generated." in both(1, "--snapshot-update")[1]
    assert len(both(1)[2]) == 2
    assert "5 snapshots passed." in both(1)[1]
    assert "3 snapshots failed." in " ".join(both(2)[1])
    assert "3 snapshots updated." in " ".join(both(2, "--snapshot-update")[1])
    source = source.replace("range(2)", "range(1)")
    assert "unused" in " ".join(both(2)[1])
    assert "2 unused snapshots deleted." in " ".join(both(2, "--snapshot-update")[1])


def test_a_plugin_brings_out_what_it_keeps_in_memory(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.fixture
        def tally(request):
            return request.config.stash["tally"]

        @pytest.mark.parametrize("n", range(3))
        def test_it(tally, n):
            tally.append(n)

        def test_fails(tally):
            tally.append("failed")
            assert 0

        def test_killed(tally):
            tally.append("killed")
            import os; os._exit(1)
        """,
        "--nsbox-all",
        conftest="""
        import pytest

        def pytest_configure(config):
            config.stash["tally"] = []

        def pytest_nsbox_pack(item):
            if item.name == "test_fails":
                return lambda: 0
            return {"tally": item.config.stash["tally"][-1:]}

        def pytest_nsbox_unpack(item, packed):
            for one in packed:
                item.config.stash["tally"] += one.get("tally", [])

        def pytest_terminal_summary(terminalreporter, config):
            terminalreporter.line(f"tallied: {config.stash['tally']}")
        """,
    )
    result.assert_outcomes(passed=3, failed=2, warnings=1)
    result.stdout.fnmatch_lines(["*pytest_nsbox_pack: what cannot be pickled is left out: <func*"])
    result.stdout.fnmatch_lines(["tallied: [[]0, 1, 2[]]"])
