"""The examples pass as a user runs them, and the documents say what is so."""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import sys
from pathlib import Path

import pytest

import pytest_nsbox
from pytest_nsbox import Container, SandboxSpec
from tests.conftest import run_tool

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def section(title: str) -> str:
    """The part of the reference under a heading."""
    return re.split(r"^## ", REFERENCE.split(f"\n## {title}\n")[1], maxsplit=1, flags=re.M)[0]


def first_cells(text: str) -> str:
    return "\n".join(re.findall(r"^\| (.*?) \|", text, re.M))


def test_the_examples_pass_and_the_readme_lists_just_them(pytester: pytest.Pytester) -> None:
    """Away from this repository's own configuration, as where they have been copied to."""
    shutil.copytree(
        ROOT / "examples", pytester.path / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )
    options = ("-p", "no:cacheprovider", "-v", "-W", "error")
    result = pytester.runpytest_subprocess(*options, "examples")
    shown = re.findall(r"^(examples/\S+::\S+) PASSED", README, re.M)
    result.assert_outcomes(passed=len(shown))
    assert re.findall(r"^(examples/\S+::\S+) PASSED", result.stdout.str(), re.M) == shown


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("test_*.py")), ids=lambda p: p.stem
)
def test_an_example_begins_with_two_lines_about_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring is not None
    assert len(docstring.splitlines()) == 2


def test_the_code_in_the_readme_does_what_the_readme_says(pytester: pytest.Pytester) -> None:
    """What fails prints what is shown, but for the directory and the peak of memory."""
    for number, block in enumerate(BLOCKS):
        if "def test_" not in block:
            exec(compile(block, "README.md", "exec"), {})
            continue
        name = "test_leak" if "rows" in block else f"test_block{number}"
        (pytester.path / f"{name}.py").write_text(block)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    def plain(text: str) -> list[str]:
        text = re.sub(r"\S*/test_leak.py:", "test_leak.py:", text)
        # the second process of the container may be asked for before its end has been told
        text = text.replace("sleep 1000' is running;", "sleep 1000' was killed by SIGKILL;")
        return re.sub(r"peak [\d.]+ MiB", "peak", text).splitlines()

    (shown,) = re.findall(r"^```console\n(_{5,} .*?)^```$", README, re.M | re.S)
    result.assert_outcomes(
        failed=len(re.findall(r"^_{5,} ", shown, re.M)),
        passed=sum(len(re.findall("^def test_", block, re.M)) for block in BLOCKS) - 2,
    )
    printed = plain(result.stdout.str())
    begin = printed.index(plain(shown)[0])
    assert printed[begin : begin + len(plain(shown))] == plain(shown)


def test_every_keyword_is_in_the_reference_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section("The marker"), re.M)
    assert rows == [field.name for field in dataclasses.fields(SandboxSpec)]


def test_every_option_is_in_the_reference_and_no_other(pytester: pytest.Pytester) -> None:
    usage = pytester.runpytest_subprocess("--help").stdout.str()
    names = set(re.findall(r"--nsbox-([a-z-]+)", usage))
    rows = re.findall(
        r"^\| `--nsbox-([a-z-]+)\S*` \| `nsbox_(\w+)` \| `PYTEST_NSBOX_(\w+)` \|",
        section("Options"),
        re.M,
    )
    assert {flag for flag, _, _ in rows} == names
    for flag, ini, environment in rows:
        name = flag.replace("-", "_")
        assert (ini, environment) == (name, name.upper())
        assert f"nsbox_{name}" in usage


def test_every_fixture_and_hook_is_in_the_reference_and_no_other(
    pytester: pytest.Pytester,
) -> None:
    from pytest_nsbox.plugin import hookspecs

    listed = pytester.runpytest_subprocess("--fixtures").stdout.str()
    fixtures = set(re.findall(r"^(nsbox_\w+)", listed, re.M))
    assert set(re.findall(r"^\| `(nsbox_\w+)`", section("Fixtures"), re.M)) == fixtures
    hooks = {name for name in vars(hookspecs) if name.startswith("pytest_nsbox_")}
    assert set(re.findall(r"^\| `(pytest_nsbox_\w+)\(", section("Hooks"), re.M)) == hooks


def test_every_command_is_in_the_reference_and_no_other() -> None:
    script = "import sys; from pytest_nsbox.cli import main; sys.exit(main(sys.argv[1:]))"

    def usage(*args: str) -> str:
        return run_tool(sys.executable, "-c", script, *args, "--help")

    text = section("The command `nsbox`")
    commands = re.findall(r"^    (\w+)  ", usage(), re.M)
    assert set(re.findall(r"^\| `nsbox (\w+)", text, re.M)) == set(commands)
    actions = re.findall(r"^    (\w+)  ", usage("cache"), re.M)
    assert re.findall(r"^\| `nsbox cache (\w+)", text, re.M) == actions
    options = set(re.findall(r"--[a-z-]+", usage("run")))
    (row,) = re.findall(r"^\| `nsbox run.*", text, re.M)
    assert set(re.findall(r"`(--[a-z-]+)`", row)) | {"--help"} == options


def test_every_public_name_is_in_the_reference() -> None:
    missing = [
        name
        for name in pytest_nsbox.__all__
        if f"## {name}\n" not in REFERENCE and f"`{name}`" not in first_cells(REFERENCE)
    ]
    assert not missing


def test_the_members_in_the_reference_exist(nsbox_container: Container) -> None:
    process = nsbox_container.popen(["true"])
    process.wait(10)
    with nsbox_container.session.network() as network:
        for title, thing in {
            "Session": nsbox_container.session,
            "Container": nsbox_container,
            "Process": process,
            "Result": nsbox_container.run(["true"]),
            "Stats": nsbox_container.stats(),
            "Network": network,
        }.items():
            names = re.findall(r"`(\w+)(?:\(.*?\))?`", first_cells(section(title)))
            assert names
            assert [name for name in names if not hasattr(thing, name)] == [], title


def test_the_links_of_the_documents_lead_somewhere() -> None:
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
