"""What a run is told: the options (command line > environment > ini > default), and which of its
tests want a container by them, by a marker or by a fixture."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

MARKER = "sandbox"


class Option:
    """One option. No dataclass: making one would cost every run of pytest a millisecond."""

    def __init__(
        self,
        name: str,
        help: str,
        default: str,
        choices: tuple[str, ...] = (),
        metavar: str | None = None,
    ) -> None:
        self.name = name
        self.help = help
        self.default = default
        self.choices = choices
        self.metavar = metavar

    @property
    def flag(self) -> str:
        return f"--nsbox-{self.name}"

    @property
    def ini(self) -> str:
        return f"nsbox_{self.name}"

    @property
    def environment(self) -> str:
        return f"PYTEST_NSBOX_{self.name.upper()}"


OPTIONS = {
    option.name: option
    for option in (
        Option(
            "rootfs",
            "root filesystem of containers: 'host', a directory, a tarball, a docker save or OCI "
            "archive, or a reference such as docker://alpine",
            "host",
            metavar="SOURCE",
        ),
        Option(
            "network",
            "network of containers: nat, isolated, none or host",
            "nat",
            ("nat", "isolated", "none", "host"),
        ),
        Option("subnet", "IPv4 subnet of the default network", "172.27.0.0/16", metavar="CIDR"),
        Option(
            "uplink",
            "how containers reach the outside",
            "auto",
            ("auto", "veth", "pasta", "slirp4netns", "none"),
        ),
        Option(
            "pool",
            "how many containers may be made ahead, while tests run, of the kinds that tests ask "
            "for; 0 for none, and then each test waits until its containers are gone",
            "4",
            metavar="N",
        ),
        Option(
            "unsupported",
            "what a test does on a host that cannot give what it asks for",
            "error",
            ("error", "skip"),
        ),
    )
}

_SWITCHES = {
    "strict": "fail the run when something of its containers is left behind at its end",
    "all": "run every test's body inside a container",
    "changes": "name the files that each body inside has changed and that went with its container",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsbox", "containers for tests (pytest-nsbox)")
    for option in OPTIONS.values():
        text = f"{option.help} (default: {option.default}; also ini {option.ini}, environment "
        group.addoption(
            option.flag,
            dest=option.ini,
            default=None,
            metavar=option.metavar or "{" + ",".join(option.choices) + "}",
            help=text + f"{option.environment})",
        )
        parser.addini(option.ini, option.help, default=None)
    for name, text in _SWITCHES.items():
        group.addoption(
            f"--nsbox-{name}",
            dest=f"nsbox_{name}",
            action="store_true",
            default=None,
            help=f"{text} (also ini nsbox_{name}, environment PYTEST_NSBOX_{name.upper()})",
        )
        parser.addini(f"nsbox_{name}", text, "bool", False)
    group.addoption(
        "--nsbox-passthrough",
        dest="nsbox_passthrough",
        action="append",
        default=None,
        metavar="PATH",
        help="a directory that bodies inside share with the host, writable; may be repeated (also "
        "ini nsbox_passthrough, environment PYTEST_NSBOX_PASSTHROUGH, separated by colons)",
    )
    parser.addini(
        "nsbox_passthrough", "directories that bodies inside share with the host", "paths", []
    )


def value(config: pytest.Config, name: str) -> str:
    """What an option is set to. Raises pytest.UsageError for a value it cannot have."""
    option = OPTIONS[name]
    given = config.getoption(option.ini, default=None)
    where = option.flag
    if given is None:
        given, where = os.environ.get(option.environment), option.environment
    if given is None:
        given, where = _ini(config, option.ini), f"ini {option.ini}"
    if given is None:
        return option.default
    if option.choices and given not in option.choices:
        allowed = ", ".join(option.choices)
        raise pytest.UsageError(f"{where}={given}: {option.help}; one of {allowed}")
    return str(given)


def number(config: pytest.Config, name: str) -> int:
    """The same for an option that is a number. Raises pytest.UsageError."""
    text = value(config, name)
    if not text.isdecimal():
        raise pytest.UsageError(f"--nsbox-{name}={text}: {OPTIONS[name].help}; a number, 0 or more")
    return int(text)


def _ini(config: pytest.Config, name: str) -> Any:
    found = config.getini(name)
    if found and name == OPTIONS["rootfs"].ini and found != "host" and ":" not in found:
        return str(config.rootpath / found)
    return found or None


def is_on(config: pytest.Config, name: str) -> bool:
    """Whether one of the switches is on."""
    name = f"nsbox_{name}"
    if config.getoption(name, default=None) is not None:
        return bool(config.getoption(name))
    text = os.environ.get(f"PYTEST_{name.upper()}")
    if text is not None:
        return text.lower() not in ("", "0", "no", "false")
    return bool(config.getini(name))


def on_linux() -> bool:
    return sys.platform == "linux"


def marked(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARKER) is not None


def uses_fixture(item: pytest.Item) -> bool:
    """Whether it asks for an nsbox fixture, directly or through another one."""
    names = getattr(item, "fixturenames", ())
    return any(name.startswith("nsbox_") and name != "nsbox_spec" for name in names)


def runs_inside(item: pytest.Item) -> bool:
    """Whether the body of a test is run in a container."""
    return (marked(item) or is_on(item.config, "all")) and not uses_fixture(item)


def wants_container(item: pytest.Item) -> bool:
    """Whether a test has anything to do with containers."""
    return marked(item) or uses_fixture(item) or is_on(item.config, "all")


def paths(config: pytest.Config) -> list[Path]:
    """The directories that bodies inside share with the host, from everywhere they are named."""
    named = [*(config.getoption("nsbox_passthrough", default=None) or ())]
    named += filter(None, os.environ.get("PYTEST_NSBOX_PASSTHROUGH", "").split(":"))
    here = config.invocation_params.dir
    return [*config.getini("nsbox_passthrough"), *(here / name for name in named)]


def check(config: pytest.Config) -> None:
    """Raises pytest.UsageError for a value that an option cannot have."""
    for name in OPTIONS:
        value(config, name)
    number(config, "pool")
    if value(config, "subnet") == OPTIONS["subnet"].default:
        return
    from pytest_nsbox.errors import SpecError
    from pytest_nsbox.model.addressing import parse_subnet

    try:
        parse_subnet(value(config, "subnet"))
    except SpecError as error:
        raise pytest.UsageError(f"--nsbox-subnet: {error}") from None
