"""Sections that compare bodies inside with pytest-forked: a fork of pytest for each test, no more.

It has to be installed beside pytest-nsbox, and to work with the pytest there: it does with 8.
"""

from __future__ import annotations

from collections.abc import Callable

from report import Case, Goal, Section, Times, difference, ratio
from suites import PLUGIN
from workbench import LIMITS, Bench

TESTS, MODULES = 200, 50
FORKED = "pytest --forked"
_NOT_THERE = "pytest-forked is not installed, or fails with this pytest"
_MORE = (
    "A forked test pays for the fork, and for the pages that pytest and its child then both write "
    "to; a body pays for the same, and for asking for its container, entering it, giving up "
    "capabilities, and telling pytest of each phase, which forked tests report all at once. The "
    "trace of a test inside is below, and whose the processors' time is."
)
# one module of a suite that has never heard of containers, of what quick tests are made of
QUICK = """
import json
import pytest

@pytest.fixture(scope="module")
def table():
    return {n: str(n) for n in range(1000)}

@pytest.fixture
def document(tmp_path, table):
    path = tmp_path / "document.json"
    path.write_text(json.dumps(table))
    return path

@pytest.mark.parametrize("n", range(12))
def test_lookup(table, n):
    assert table[n] == str(n)

@pytest.mark.parametrize("n", range(4))
def test_document(document, table, n):
    assert json.loads(document.read_text())[str(n)] == table[n]

class TestOutput:
    def test_printed(self, capsys):
        print("text")
        assert capsys.readouterr().out == "text\\n"

    def test_environment(self, monkeypatch):
        monkeypatch.setenv("NAME", "value")

    def test_raises(self):
        with pytest.raises(KeyError):
            {}["missing"]

    def test_skipped(self):
        pytest.skip("on purpose")
"""


def each(bench: Bench) -> Section:
    what = "an empty test inside adds / a forked one adds"
    return _beside_forked(bench, "", "empty tests", "pass", what, 1.5)


def unhurried(bench: Bench) -> Section:
    tests = "tests of 20 ms, in which the next container can be made"
    what = "a test of 20 ms inside adds / a forked one adds"
    return _beside_forked(bench, ", of 20 ms", tests, "time.sleep(0.02)", what, 1)


def _beside_forked(
    bench: Bench, title: str, tests: str, body: str, what: str, limit: float
) -> Section:
    mark = f"import pytest\npytestmark = pytest.mark.sandbox(**{LIMITS!r})\n"
    text = "import time\n" + "".join(f"\ndef test_{n}(): {body}\n" for n in range(TESTS))
    plain, inside, words = f"{TESTS} plain", f"{TESTS} inside", f"{TESTS} passed"

    def added(times: Times) -> float | None:
        if FORKED not in times:
            return None
        return difference(times, inside, plain) / difference(times, FORKED, plain)

    return Section(
        f"Tests that run inside, beside forked ones{title}",
        f"A run of pytest over {TESTS} {tests}: each in a new container with limits and "
        "network, all of them plain, and with a fork of pytest for each. What is paid once per run "
        "is in the difference.",
        [
            Case(inside, bench.pytest("each-inside", mark + text, words, plugins=PLUGIN)),
            Case(plain, bench.pytest("each-plain", text, words, plugins=PLUGIN)),
            *forked(bench, bench.pytest("each-forked", text, words, "--forked", plugins=_BOTH)),
        ],
        plain,
        max(2, bench.runs // 20),
        bench.floor,
        difference=True,
        per=TESTS,
        goals=[Goal(what, limit, added, without=_NOT_THERE, hindrance=_MORE)],
    )


def suite(bench: Bench) -> Section:
    words = f"{19 * MODULES} passed, {MODULES} skipped"
    inside = "pytest --nsbox-all"

    def run(name: str, *options: str, plugins: str = PLUGIN) -> Callable[[], float]:
        files = {f"test_{number}.py": QUICK for number in range(1, MODULES)}
        return bench.pytest(name, QUICK, words, *options, plugins=plugins, more=files)

    return Section(
        f"A suite of {20 * MODULES:,} quick tests",
        f"{MODULES} modules with fixtures of function and module scope, parameters, files in "
        "`tmp_path` and captured output, from the start of pytest to its end: as they are, each "
        "test in a container, and each in a fork of pytest.",
        [
            Case(inside, run("suite-inside", "--nsbox-all")),
            Case("pytest", run("suite-plain")),
            *forked(bench, run("suite-forked", "--forked", plugins=_BOTH)),
        ],
        "pytest",
        max(2, bench.runs // 40),
        bench.floor,
        goals=[
            Goal(
                f"{20 * MODULES:,} quick tests, --nsbox-all / --forked",
                3,
                ratio(inside, FORKED),
                without=_NOT_THERE,
            )
        ],
        warm_up=False,
    )


_BOTH = f"{PLUGIN} pytest_forked"


def forked(bench: Bench, run: Callable[[], float]) -> list[Case]:
    """The case, where pytest-forked works here."""
    one = bench.pytest("forked-works", "def test_it(): pass", "1 passed", "--forked", plugins=_BOTH)
    try:
        one()
    except SystemExit:
        return []
    return [Case(FORKED, run)]
