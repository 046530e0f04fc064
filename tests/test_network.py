"""A container has a network of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any, cast

import pytest

from pytest_nsbox import Bind, Container, ContainerDied, Session, SetupError, WaitError
from pytest_nsbox.launcher.hub import Bridge, Hub, Interface
from pytest_nsbox.model.addressing import Subnet

SERVER = ["python3", "-m", "http.server", "8000"]


def test_the_first_container_has_the_first_address(nsbox_container: Container) -> None:
    assert nsbox_container.ip == "172.27.0.2"
    addresses = nsbox_container.run(["ip", "-brief", "address"], check=True).stdout
    assert "172.27.0.2/16" in addresses
    assert f"{nsbox_container.ip6}/64" in addresses
    route = nsbox_container.run(["ip", "route"], check=True).stdout
    assert "default via 172.27.0.1 dev eth0" in route


def test_it_has_so_again_when_another_has_gone(nsbox_container_factory: Any) -> None:
    with nsbox_container_factory() as first:
        assert first.ip == "172.27.0.2"
        first.run(["ping", "-c1", "-W1", "172.27.0.1"], check=True)
    second = nsbox_container_factory()
    assert second.ip == "172.27.0.2"
    second.run(["ping", "-c1", "-W1", "172.27.0.1"], check=True)


def test_lo_and_the_gateway_answer(nsbox_container: Container) -> None:
    for address in ("127.0.0.1", "172.27.0.1", "::1", "fd6e:7362:ac1b::1"):
        nsbox_container.run(["ping", "-c1", "-W1", address], check=True)


def test_a_server_inside_is_reached_by_connect(nsbox_container: Container) -> None:
    nsbox_container.popen(SERVER)
    nsbox_container.wait_for_port(8000)
    with nsbox_container.connect(8000) as sock:
        assert sock.getpeername() == ("172.27.0.2", 8000)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert sock.makefile("rb").readline() == b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize("mode", ["nat", "isolated", "none"])
def test_a_server_on_its_loopback_is_reached_by_connect(
    nsbox_container_factory: Any, mode: str
) -> None:
    container = nsbox_container_factory(network=mode)
    container.popen([*SERVER, "--bind", "127.0.0.1"])
    container.wait_for_port(8000)
    with container.connect(8000) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert sock.makefile("rb").readline() == b"HTTP/1.0 200 OK\r\n"


def test_a_port_that_nobody_listens_on_refuses(nsbox_container: Container) -> None:
    with pytest.raises(ConnectionRefusedError, match="port 9 of container"):
        nsbox_container.connect(9)


@pytest.mark.parametrize("bind", ["0.0.0.0", "127.0.0.1"])
def test_a_published_port_serves_any_client_on_the_hosts_loopback(
    nsbox_container: Container, bind: str
) -> None:
    nsbox_container.write_text("/srv/page", "x" * 1_000_000)
    nsbox_container.popen([*SERVER, "--bind", bind, "--directory", "/srv"])
    nsbox_container.wait_for_port(8000)
    host, port = nsbox_container.publish(8000)
    assert host == "127.0.0.1"
    with urllib.request.urlopen(f"http://{host}:{port}/page", timeout=10) as answer:
        assert answer.read() == b"x" * 1_000_000
    client = ["curl", "-sf", f"http://{host}:{port}/page"]
    assert len(subprocess.run(client, capture_output=True, check=True).stdout) == 1_000_000


def test_a_published_port_waits_for_a_slow_client(nsbox_container: Container) -> None:
    """What does not fit into the client's small buffer is kept, and nothing of it lost."""
    data = os.urandom(1 << 20) * 20
    nsbox_container.write_bytes("/srv/page", data)
    nsbox_container.popen([*SERVER, "--directory", "/srv"])
    nsbox_container.wait_for_port(8000)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(nsbox_container.publish(8000))
        sock.sendall(b"GET /page HTTP/1.0\r\n\r\n")
        answer = bytearray()
        while chunk := sock.recv(4096):
            answer += chunk
    assert bytes(answer[-len(data) :]) == data


def test_a_published_port_ends_with_its_container(nsbox_container_factory: Any) -> None:
    with nsbox_container_factory() as container:
        container.popen(SERVER)
        container.wait_for_port(8000)
        host, port = container.publish(8000)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=5)


def test_a_published_port_where_nothing_listens_refuses(nsbox_container: Container) -> None:
    host, port = nsbox_container.publish(8000)
    with socket.create_connection((host, port), timeout=5) as sock:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_waiting_for_a_port_fails_at_once_when_its_process_has_died(
    nsbox_container: Container,
) -> None:
    nsbox_container.popen("echo no licence found >&2; exit 3", shell=True)
    with pytest.raises(WaitError, match=r"(?s)cannot open any more.*status 3.*no licence found"):
        nsbox_container.wait_for_port(8000, timeout=60)


def test_waiting_for_a_port_fails_after_its_timeout(nsbox_container: Container) -> None:
    nsbox_container.popen(["sleep", "1000"])
    begin = time.monotonic()
    with pytest.raises(WaitError, match=r"has not opened within 0\.1 s"):
        nsbox_container.wait_for_port(8000, timeout=0.1)
    assert time.monotonic() - begin < 3


def test_two_containers_reach_each_other_by_address_and_name(
    nsbox_container_factory: Any,
) -> None:
    a, b = nsbox_container_factory("a"), nsbox_container_factory("b")
    for one, other in ((a, b), (b, a)):
        one.run(["ping", "-c1", "-W1", other.ip], check=True)
        one.run(["ping", "-c1", "-W1", other.name], check=True)


def test_many_pairs_reach_each_other_with_their_first_packet(
    nsbox_container_factory: Any,
) -> None:
    """A link that is up is ready: no packet is lost, none waits for a second try."""
    for _ in range(10):
        with nsbox_container_factory("a") as a, nsbox_container_factory("b") as b:
            a.run(["ping", "-c1", "-W0.5", b.ip], check=True)


def test_a_new_owner_of_an_address_is_made_known() -> None:
    """The kernel may still be taking the last owner's link down: what the bridge and the gateway
    have learned of it is replaced in the same message, before the first packet."""
    bridge = Bridge(1, "lan", cast(Hub, None), Subnet("10.9.0.0/24"), 11, 1500)
    interface = Interface(bridge, 2, 12)
    requests = [request.describe() for request in interface.wire("eth0", 2, 3)]
    assert requests == [
        "ip link add veth12 type veth peer name eth0",
        "bridge fdb replace 02:42:0a:09:00:02 dev veth12 master static sticky",
        "ip neigh replace 10.9.0.2 lladdr 02:42:0a:09:00:02",
        "ip neigh replace fd6e:7362:a09::2 lladdr 02:42:0a:09:00:02",
    ]


def test_the_last_owner_of_an_address_is_not_taken_for_the_new_one(
    nsbox_container_factory: Any,
) -> None:
    """Its network is taken down later; here a process holds it, and speaks to the others."""
    client = nsbox_container_factory("client")
    old = nsbox_container_factory("old")
    script = """if 1:
        import socket, sys
        listener = socket.create_server(("", 80))
        while True:
            print("on", flush=True)
            sys.stdin.readline() or sys.exit()
            socket.socket(type=socket.SOCK_DGRAM).sendto(b"", (sys.argv[1], 9))
    """
    enter = ["nsenter", f"--net=/proc/{old.pid}/ns/net", sys.executable, "-c", script, client.ip]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(enter, **pipes) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "on\n"
        old.close()
        new = nsbox_container_factory("new")
        assert new.ip == old.ip
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "on\n"
        refused = client.run(["curl", "--silent", "--max-time", "5", f"http://{new.ip}"])
        assert refused.returncode == 7
        holder.stdin.close()


def test_a_link_has_one_queue_however_many_cpus_there_are(nsbox_container: Container) -> None:
    link = nsbox_container.run(["ip", "-details", "link", "show", "eth0"], check=True).stdout
    assert "numtxqueues 1 numrxqueues 1" in link


def test_networks_do_not_reach_each_other(
    nsbox_container_factory: Any, nsbox_network_factory: Any
) -> None:
    lan = nsbox_network_factory("lan", subnet="10.9.0.0/24")
    a, b = (nsbox_container_factory(name, networks=[lan]) for name in "ab")
    c = nsbox_container_factory("c")
    assert (a.ip, b.ip) == ("10.9.0.2", "10.9.0.3")
    a.run(["ping", "-c1", "-W1", "b"], check=True)
    assert a.run(["ping", "-c1", "-W0.3", c.ip]).returncode == 1
    assert c.run(["ping", "-c1", "-W0.3", a.ip]).returncode == 1


def test_a_container_can_be_on_two_networks(
    nsbox_container_factory: Any, nsbox_network_factory: Any
) -> None:
    front = nsbox_network_factory("front", subnet="10.9.1.0/24")
    back = nsbox_network_factory("back", subnet="10.9.2.0/24", internet=False)
    proxy = nsbox_container_factory("proxy", networks=[front, back])
    client = nsbox_container_factory("client", networks=[front])
    store = nsbox_container_factory("store", networks=[back])
    proxy.run(["ping", "-c1", "-W1", "client"], check=True)
    proxy.run(["ping", "-c1", "-W1", "store"], check=True)
    assert client.run(["ping", "-c1", "-W0.3", store.ip]).returncode != 0


def test_those_that_came_to_nothing_are_in_no_ones_way(nsbox_container_factory: Any) -> None:
    nowhere = Bind("/etc/passwd", "/proc/nowhere")
    for _ in range(100):  # each leaves answers of the kernel that nobody has asked for
        with pytest.raises(SetupError, match="nowhere"):
            nsbox_container_factory(mounts=[nowhere])
    for _ in range(2):
        container = nsbox_container_factory()
        container.run(["ping", "-c1", "-W1", "172.27.0.1"], check=True)


def test_a_sysctl_for_interfaces_to_come_is_set_before_they_come(
    nsbox_container_factory: Any,
) -> None:
    sysctls = {"net.ipv4.conf.default.accept_local": 1}
    for _ in range(3):  # the first, and those whose init has been waiting for it
        with nsbox_container_factory(sysctls=sysctls) as container:
            found = container.read_text("/proc/sys/net/ipv4/conf/eth0/accept_local")
            assert found == "1\n"


def test_none_has_only_lo(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(network="none")
    assert container.ip is None
    links = container.run(["ip", "-o", "link"], check=True).stdout.splitlines()
    assert [line.split(":")[1].strip() for line in links] == ["lo"]


def test_host_is_the_hosts_network(nsbox_container_factory: Any) -> None:
    container = nsbox_container_factory(network="host")
    # a sysfs is of the network namespace that it was mounted in (sysfs(5))
    assert container.call(os.listdir, "/sys/class/net") == os.listdir("/sys/class/net")
    links = container.run(["readlink", "/proc/self/ns/net"], check=True).stdout.strip()
    assert links == os.readlink("/proc/self/ns/net")


def test_the_hosts_loopback_is_out_of_reach(nsbox_container: Container) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert "ConnectionRefused" in nsbox_container.run(["python3", "-c", script]).stderr


def test_two_pytest_processes_at_once_use_the_same_addresses(pytester: pytest.Pytester) -> None:
    """Each waits until both have their servers up, then finds its own and not the other's."""
    from tests.conftest import command_line

    pytester.makepyfile(
        """
        import os, pathlib, time

        def test_it(nsbox_container):
            me, other = os.environ["ME"], os.environ["OTHER"]
            assert nsbox_container.ip == "172.27.0.2"
            nsbox_container.write_text("/srv/who", me)
            nsbox_container.popen(["python3", "-m", "http.server", "80", "--directory", "/srv"])
            nsbox_container.wait_for_port(80, timeout=100)
            pathlib.Path(me).touch()
            nsbox_container.wait_until(pathlib.Path(other).exists, timeout=100)
            with nsbox_container.connect(80) as sock:
                sock.sendall(b"GET /who HTTP/1.0\\r\\n\\r\\n")
                assert sock.makefile().read().endswith(me)
        """
    )
    runs = []
    for me, other in (("one", "two"), ("two", "one")):
        env = {**os.environ, "ME": me, "OTHER": other}
        runs.append(
            subprocess.Popen(
                command_line(), env=env, stdout=subprocess.PIPE, text=True, cwd=pytester.path
            )
        )
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(run)
        outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)


def test_sysctls_of_the_network_are_set(nsbox_container_factory: Callable[..., Container]) -> None:
    container = nsbox_container_factory(sysctls={"net.ipv4.ip_forward": 1})
    assert container.read_text("/proc/sys/net/ipv4/ip_forward") == "1\n"
    container.run("echo 0 > /proc/sys/net/ipv4/ip_forward", shell=True, check=True)


def test_a_dead_container_refuses_to_connect(nsbox_container: Container) -> None:
    nsbox_container.popen(SERVER)
    nsbox_container.wait_for_port(8000)
    nsbox_container.kill()
    with pytest.raises(ContainerDied, match="has been killed"):
        nsbox_container.connect(8000, timeout=1)


def test_a_network_made_after_another_was_removed_is_not_mixed_up_with_a_third(
    nsbox_session: Session,
) -> None:
    gone = nsbox_session.network("gone", subnet="10.9.1.0/24")
    with nsbox_session.network("kept", subnet="10.9.2.0/24") as kept:
        gone.close()
        with (
            nsbox_session.network("new", subnet="10.9.3.0/24") as new,
            nsbox_session.container(networks=[kept]) as a,
            nsbox_session.container(networks=[new]) as b,
        ):
            assert (a.ip, b.ip) == ("10.9.2.2", "10.9.3.2")
