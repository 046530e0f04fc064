"""An outside of our own: two network namespaces that stand for a host and for the internet.

the host                              the outside
eth0 198.51.100.2/24  --- veth ---    198.51.100.1/24, DNS on port 53
default via 198.51.100.1              203.0.113.80: www.example.test, HTTP on port 80
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import run_tool, tool

WEB = "203.0.113.80"
NAME_SERVER = "198.51.100.1"
HOST = "198.51.100.2"

_WEB_SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(("you are " + self.client_address[0]).encode())
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("203.0.113.80", 80), Handler)
print("ready", flush=True)
server.serve_forever()
"""


class Outside:
    """Runs commands on the stand-in for the host."""

    def __init__(self, host_pid: int) -> None:
        self.enter = [tool("nsenter"), "-t", str(host_pid), "-n", "-m", "--wd=" + os.getcwd()]

    def run(self, *command: str) -> str:
        return run_tool(*self.enter, *command)

    def state(self) -> str:
        """Everything of the host's network that must be afterwards as it was."""
        return "\n".join(
            [
                self.run("ip", "-o", "link"),
                self.run("ip", "-o", "-4", "address"),
                self.run("ip", "route", "show", "table", "all"),
                self.run("ip", "rule"),
                self.run("nft", "list", "ruleset"),
                self.run(
                    "sh",
                    "-c",
                    "sysctl -a 2>/dev/null | grep -E 'net.ipv[46].(conf|ip)' | grep -v mtu",
                ),
            ]
        )


@contextlib.contextmanager
def outside(directory: Path) -> Iterator[Outside]:
    """Build it in namespaces that end with their processes."""
    with contextlib.ExitStack() as stack:

        def start(*command: str | Path) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            for stream in (process.stdin, process.stdout):
                stack.callback(stream.close)  # type: ignore[union-attr]
            return process

        def namespace(*flags: str) -> int:
            """A process that holds new namespaces, and says so."""
            process = start("unshare", *flags, "sh", "-c", "echo ready; exec cat")
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return process.pid

        host, web = namespace("-n", "-m"), namespace("-n")
        in_web = ["nsenter", "-t", str(web), "-n"]
        world = Outside(host)
        (directory / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")
        world.run("mount", "--bind", str(directory / "resolv.conf"), "/etc/resolv.conf")
        world.run("ip", "link", "set", "lo", "up")
        world.run("ip", "link", "add", "eth0", "type", "veth", "peer", "veth0", "netns", str(web))
        world.run("ip", "address", "add", f"{HOST}/24", "dev", "eth0")
        # or an IPv6 address would appear while a test looks
        world.run("ip", "link", "set", "eth0", "addrgenmode", "none", "up")
        for line in (
            "link set lo up",
            f"address add {WEB}/32 dev lo",
            f"address add {NAME_SERVER}/24 dev veth0",
            "link set veth0 up",
        ):
            run_tool(*in_web, "ip", *line.split())
        world.run("ip", "route", "add", "default", "via", NAME_SERVER)
        server = start(*in_web, sys.executable, "-c", _WEB_SERVER)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        names = start(
            *in_web, tool("dnsmasq"), "--no-daemon", "--log-facility=-", "--no-resolv",
            "--no-hosts", "--conf-file=/dev/null", f"--address=/www.example.test/{WEB}",
            f"--listen-address={NAME_SERVER}", "--bind-interfaces", "--user=root",
        )  # fmt: skip
        assert names.stdout is not None
        assert any("started" in line for line in iter(names.stdout.readline, ""))
        yield world
