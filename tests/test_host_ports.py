"""A server of the test, reached from inside."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from pytest_nsbox import Container, ContainerDied, Session, SpecError

Make = Callable[..., Container]
FETCH = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as s:
    s.sendall(b"hello")
    s.shutdown(socket.SHUT_WR)
    data = b""
    while chunk := s.recv(65536):
        data += chunk
print(data[:20].decode(), len(data))
"""


class Echo(threading.Thread):
    """Sends back what it is sent, many times over."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(daemon=True)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.server = socket.create_server((address, port), family=family)
        self.port = int(self.server.getsockname()[1])
        self.served = 0

    def run(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            with client:
                self.served += 1
                client.sendall(client.recv(100) * 100_000)

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.join(10)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    server.start()
    yield server
    server.close()


def fetch(container: Container, host: str, port: int) -> str:
    result = container.run(["python3", "-c", FETCH, host, str(port)], timeout=20)
    return str(result.stdout.strip() or result.stderr.strip().splitlines()[-1])


GOOD = "hellohellohellohello 500000"


@pytest.mark.parametrize("network", ["nat", "isolated", "none", "host"])
def test_a_server_of_the_test_is_reached_in_every_mode(
    nsbox_container_factory: Make, echo: Echo, network: str
) -> None:
    container = nsbox_container_factory(network=network)
    host, port = container.expose_host(echo.port)
    assert fetch(container, host, port) == GOOD
    for name in ("nsbox", "docker", "testcontainers"):
        assert fetch(container, f"host.{name}.internal", port) == GOOD
    assert port == echo.port
    assert container.expose_host(echo.port) == (host, port)
    assert container.changes() == []


def test_nothing_else_of_the_hosts_loopback_is_opened(
    nsbox_container: Container, echo: Echo
) -> None:
    other = Echo()
    other.start()
    host, _ = nsbox_container.expose_host(echo.port)
    assert "refused" in fetch(nsbox_container, host, other.port)
    assert "refused" in fetch(nsbox_container, "127.0.0.1", echo.port)
    assert other.served == 0
    other.close()


def test_a_neighbour_is_refused_until_it_asks_itself(nsbox_session: Session, echo: Echo) -> None:
    with nsbox_session.container("asks") as one:
        host, port = one.expose_host(echo.port)
        with nsbox_session.container("other") as other:
            assert "reset" in fetch(other, host, port)
            assert echo.served == 0
            assert other.expose_host(port) == (host, port)
            assert fetch(other, host, port) == GOOD
            other.kill()
        assert fetch(one, host, port) == GOOD
    # the next one has the address of the first, and nothing of what that was given
    with nsbox_session.container("next") as after:
        assert after.ip == one.ip
        assert "refused" in fetch(after, host, port)
        assert after.expose_host(port) == (host, port)
        assert fetch(after, host, port) == GOOD


def test_it_need_not_listen_yet_and_may_be_on_the_other_loopback(
    nsbox_container: Container,
) -> None:
    server = Echo("::1")
    host, port = nsbox_container.expose_host(server.port)
    server.server.close()
    assert "reset" in fetch(nsbox_container, host, port)
    later = Echo("::1", port)
    later.start()
    assert fetch(nsbox_container, host, port) == GOOD
    later.close()


def test_a_server_inside_may_have_the_same_port(nsbox_container: Container, echo: Echo) -> None:
    host, port = nsbox_container.expose_host(echo.port)
    server = nsbox_container.popen(["python3", "-m", "http.server", str(port)])
    nsbox_container.wait_for_port(port, process=server)
    assert fetch(nsbox_container, host, port) == GOOD
    nsbox_container.connect(port).close()


def test_a_read_only_container_knows_the_name_too(
    nsbox_container_factory: Make, echo: Echo
) -> None:
    for spec in ({}, {"userns": True}):
        container = nsbox_container_factory(read_only=True, **spec)
        container.expose_host(echo.port)
        assert fetch(container, "host.nsbox.internal", echo.port) == GOOD
        assert container.changes() == []


def test_what_cannot_be_exposed_is_said(nsbox_session: Session) -> None:
    with nsbox_session.container(network="none") as container:
        for port in (0, 65536, -1):
            with pytest.raises(SpecError, match=f"port {port} is not"):
                container.expose_host(port)
        server = container.popen(["python3", "-m", "http.server", "8000"])
        container.wait_for_port(8000, process=server)
        with pytest.raises(OSError, match="in use"):
            container.expose_host(8000)
        container.kill()
        with pytest.raises(ContainerDied):
            container.expose_host(8001)


def test_it_leaves_nothing(nothing_left: object, nsbox_session: Session, echo: Echo) -> None:
    with nsbox_session.container() as one, nsbox_session.container() as two:
        for container in (one, two):
            container.expose_host(echo.port)
            container.expose_host(1)
        with nsbox_session.container(network="none") as lonely:
            lonely.expose_host(echo.port)
