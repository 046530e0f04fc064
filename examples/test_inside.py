"""The test's own body inside a container: it is root, on a machine made for it alone.
It may write where it likes and bind what it likes; only tmp_path and its kind are kept."""

import os
import socket
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.sandbox(hostname="shop", network="isolated")


class Bank(BaseHTTPRequestHandler):
    """Stands in for a service on the internet."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"paid")

    def log_message(self, *args):
        pass


def test_a_service_of_the_internet_is_played_on_port_80():
    with open("/etc/hosts", "a") as hosts:
        hosts.write("127.0.0.1 bank.example\n")

    with HTTPServer(("127.0.0.1", 80), Bank) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        client = HTTPConnection("bank.example", timeout=10)
        client.request("GET", "/pay")
        assert client.getresponse().read() == b"paid"
        client.close()


def test_the_machine_is_its_own():
    assert socket.gethostname() == "shop"
    assert "bank.example" not in Path("/etc/hosts").read_text()  # what the last test wrote

    Path("/etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    os.remove("/bin/sh")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Wider than one test, so it lives outside, and sees what the test inside has left."""
    directory = tmp_path_factory.mktemp("reports")
    yield directory
    assert (directory / "report.txt").read_text() == "written on shop\n"


def test_temporary_directories_of_pytest_are_kept(reports, tmp_path):
    assert tmp_path.parent == reports.parent  # tmp_path as well
    (reports / "report.txt").write_text(f"written on {socket.gethostname()}\n")
