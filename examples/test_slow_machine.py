"""A client that must answer in time, also when the server's machine has a tenth of a core left.
cpus= is what the machine has; update() takes most of it away while the server runs."""

import sys

import pytest

# an answer takes 0.2 s of processor time: on a tenth of a core that is about 2 s
SERVER = """
import socket, time
with socket.create_server(("", 8000)) as listener:
    while True:
        connection, _ = listener.accept()
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        with connection:
            connection.sendall(b"the price of today")
"""


def price(container, deadline):
    """The client under test: past its deadline it says what it knew before."""
    with container.connect(8000) as server:
        server.settimeout(deadline)
        try:
            return server.recv(100).decode()
        except TimeoutError:
            return "the price of yesterday"


@pytest.mark.sandbox(cpus=1)
def test_the_client_keeps_its_deadline(nsbox_container):
    nsbox_container.popen([sys.executable, "-c", SERVER])
    nsbox_container.wait_for_port(8000)
    assert price(nsbox_container, deadline=30) == "the price of today"

    nsbox_container.update(cpus=0.1)
    assert price(nsbox_container, deadline=0.5) == "the price of yesterday"
