"""What pytest itself offers, with bodies inside: its items, its fixtures, what it remembers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.test_inside import normal

Run = Callable[..., pytest.RunResult]

CONFTEST = """
import pytest

class Lines(pytest.File):
    def collect(self):
        for line in self.path.read_text().splitlines():
            yield Line.from_parent(self, name=line)

class Line(pytest.Item):
    def setup(self):
        self.seen = ["setup"]

    def runtest(self):
        assert self.seen == ["setup"]
        if self.name == "inside":
            assert __import__("os").getppid() == 0
        if self.name == "wrong":
            raise ValueError(self.name)

    def teardown(self):
        print("torn down", self.name)

    def repr_failure(self, excinfo):
        return f"a line is {excinfo.value}"

    def reportinfo(self):
        return self.path, 0, f"line: {self.name}"

def pytest_collect_file(parent, file_path):
    if file_path.suffix == ".lines":
        return Lines.from_parent(parent, path=file_path)

@pytest.fixture(autouse=True)
def _in_doctests(doctest_namespace, request):
    doctest_namespace["answer"] = 42
"""

SUITE = '''
import os, sys, unittest, pytest

def documented():
    """
    >>> answer
    42
    >>> print("one")
    two
    """

class Documented:
    """
    >>> import socket
    >>> answer + 1
    43
    """

class TestCase(unittest.TestCase):
    done = []

    @classmethod
    def setUpClass(cls):
        cls.done = ["class"]
        cls.addClassCleanup(print, "class cleaned up")

    def setUp(self):
        self.addCleanup(print, "cleaned up")

    def test_subtests(self):
        for n in range(4):
            with self.subTest("numbers", n=n):
                if n == 3:
                    self.skipTest("three")
                self.assertNotEqual(n, 1)

    def test_passing_subtests(self):
        with self.subTest(letter="a"):
            self.assertEqual(self.done, ["class"])

    def test_clean_up_that_fails(self):
        self.addCleanup(lambda: 1 / 0)

class TestAsync(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        print("set up")

    async def test_it(self):
        self.assertTrue(False)

class TestSkipped(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise unittest.SkipTest("all of it")

    def test_it(self): pass

@pytest.fixture
def finalized(request):
    for n in range(3):
        request.addfinalizer(lambda n=n: print("finalizer", n))
    request.addfinalizer(lambda: 1 / 0)
    return []

def test_finalizers(finalized, request):
    request.node.addfinalizer(lambda: print("of the node"))

@pytest.fixture(scope="module")
def wide(request):
    request.addfinalizer(lambda: print("wide ended"))

def test_wide(wide): assert 0

def test_capfd(capfd):
    os.write(1, b"to the descriptor")
    os.system("echo from a child >&2")
    assert capfd.readouterr() == ("to the descriptor", "from a child\\n")
    with capfd.disabled():
        print("not captured")
    print("captured again")
    os.write(2, b"and not read")
    assert 0

def test_capsysbinary(capsysbinary):
    sys.stdout.buffer.write(b"\\xff")
    assert capsysbinary.readouterr().out == b"\\xff"

def test_factory(tmp_path_factory, tmp_path):
    made = tmp_path_factory.mktemp("made")
    (made / "file").write_text("")
    assert tmp_path.is_dir() and made.parent == tmp_path.parent

@pytest.mark.parametrize("how", ["runpytest_inprocess", "runpytest_subprocess"])
def test_pytester(pytester, how):
    pytester.makepyfile("def test_a(): pass", test_b="def test_b(): assert 0")
    getattr(pytester, how)("-p", "no:cacheprovider").assert_outcomes(passed=1, failed=1)
    assert 0
'''


def test_all_kinds_of_items_and_fixtures_are_as_outside(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    pytester.path.joinpath("some.lines").write_text("right\nwrong\n")
    options = (
        "test_it.py",
        "some.lines",
        "--doctest-modules",
        "-p",
        "pytester",
        "-rA",
        "--capture=sys",
    )
    outside = run_pytest(SUITE, *options, conftest=CONFTEST)
    inside = run_pytest(SUITE, *options, "--nsbox-all", conftest=CONFTEST)
    assert "tests inside containers, 0 beside" in inside.stdout.str()
    assert "has run outside" not in inside.stdout.str()
    text = inside.stdout.str().replace("runpytest-1", "runpytest-0")
    assert normal(text) == normal(outside.stdout.str())
    assert inside.parseoutcomes() == outside.parseoutcomes()
    assert inside.parseoutcomes()["failed"] > 5


def test_doctests_and_custom_items_really_are_inside(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    pytester.path.joinpath("some.lines").write_text("inside\n")
    pytester.path.joinpath("test_text.txt").write_text(
        ">>> import socket\n>>> socket.gethostname()\n'nsbox1'\n"
    )
    result = run_pytest(
        """
        import socket, unittest

        class TestCase(unittest.IsolatedAsyncioTestCase):
            async def test_it(self):
                self.assertEqual(socket.gethostname(), "nsbox1")

        def documented():
            '''
            >>> socket.gethostname()
            'nsbox1'
            '''
        """,
        *("--doctest-modules", "--nsbox-all"),
        conftest=CONFTEST,
    )
    result.assert_outcomes(passed=4)


def test_what_pytest_remembers_of_bodies_inside(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pathlib, pytest

        def test_passes(cache):
            assert cache.get("suite/value", None) is None
            cache.set("suite/value", [1, 2])
            (cache.mkdir("suite") / "file").write_text("kept")

        def test_fails(cache):
            assert cache.get("suite/value", None) != [1, 2]

        def test_last(): pass
        """
    )
    run = pytester.runpytest_subprocess
    run("--nsbox-all").assert_outcomes(passed=2, failed=1)
    again = run("--nsbox-all", "--lf", "-v")
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(
        ["run-last-failure: rerun previous 1 failure", "*test_fails FAILED*"]
    )
    assert pytester.path.joinpath(".pytest_cache/d/suite/file").read_text() == "kept"
    step = run("--nsbox-all", "--sw", "--deselect=test_it.py::test_passes")
    step.assert_outcomes(failed=1, deselected=1)
    pytester.makepyfile(
        test_it="""
        def test_passes(): assert 0
        def test_fails(): pass
        def test_last(): pass
        """
    )
    step = run("--nsbox-all", "--sw")
    step.assert_outcomes(passed=2, deselected=1)
    step.stdout.fnmatch_lines(["stepwise: skipping 1 already passed items*"])


def test_what_comes_out_of_a_body_does_not_grow_with_the_run(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import pytest

        @pytest.mark.parametrize("n", range(100, 140))
        def test_it(n): pass
        """,
        "--nsbox-all",
        conftest="""
        import pickle
        from pytest_nsbox.plugin import luggage

        sizes, unpack = {}, luggage.unpack

        def weigh(item, found):
            sizes[item.name] = sizes.get(item.name, 0) + len(pickle.dumps(found))
            unpack(item, found)

        luggage.unpack = weigh

        def pytest_terminal_summary(terminalreporter):
            found = list(sizes.values())
            terminalreporter.line(f"of {len(found)} tests: {found[-1] - found[0]:+} bytes")
        """,
    )
    result.assert_outcomes(passed=40)
    result.stdout.fnmatch_lines(["of 40 tests: +0 bytes"])


def test_durations_are_those_of_the_phases_inside(run_pytest: Run) -> None:
    result = run_pytest(
        """
        import time, pytest

        @pytest.fixture
        def slow():
            time.sleep(0.3)
            yield
            time.sleep(0.3)

        def test_it(slow):
            time.sleep(0.3)
        """,
        *("--nsbox-all", "--durations=0", "--durations-min=0.3"),
    )
    result.assert_outcomes(passed=1)
    for phase in ("setup", "call", "teardown"):
        result.stdout.re_match_lines([rf"[0-9.]+s {phase} +test_it.py::test_it"])


def test_threads_of_the_pytest_process_do_no_harm(run_pytest: Run) -> None:
    """They take, all the time, the locks that CPython renews in a fork, and a body needs them."""
    result = run_pytest(
        """
        import importlib, logging, random, sys, tempfile, threading, http.server, urllib.request
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def busy():
            ended = threading.Event()

            def work():
                logger = logging.getLogger("busy")
                while not ended.is_set():
                    importlib.reload(sys.modules["colorsys"])
                    logger.warning("busy")
                    tempfile.mktemp()
                    random.random()

            import colorsys
            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            yield
            ended.set()
            for thread in threads:
                thread.join()

        @pytest.fixture(scope="session")
        def server():
            class Answer(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(204)
                    self.end_headers()

                def log_message(self, *args): pass

            with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as found:
                thread = threading.Thread(target=found.serve_forever)
                thread.start()
                yield found.server_address
                found.shutdown()
                thread.join()

        @pytest.mark.parametrize("n", range(8))
        def test_locks(n):
            assert threading.active_count() == 1
            import this
            logging.getLogger("body").warning("in the body")
            tempfile.mkstemp()
            random.random()
            thread = threading.Thread(target=print, args=("in a thread",))
            thread.start()
            thread.join()

        @pytest.mark.sandbox(network="host")
        def test_server(server):
            host, port = server
            assert urllib.request.urlopen(f"http://{host}:{port}/").status == 204
        """,
        *("--nsbox-all", "-W", "error"),
    )
    result.assert_outcomes(passed=9)


def test_a_body_recurses_as_deep_as_a_plain_test(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    body = """
        def deeper(n):
            try:
                return deeper(n + 1)
            except RecursionError:
                return n

        {mark}
        def test_it(tmp_path):
            (tmp_path / "depth").write_text(str(deeper(0)))
    """
    depths = []
    for mark in ("", "@__import__('pytest').mark.sandbox"):
        result = run_pytest(body.format(mark=mark), f"--basetemp={pytester.path}/base")
        result.assert_outcomes(passed=1)
        depths.append(int((pytester.path / "base/test_it0/depth").read_text()))
    # to within one: up to Python 3.11 a call by way of C, of a class for one, counts as well
    assert depths[0] > 500
    assert 0 <= depths[0] - depths[1] <= 1
