"""A server and its client, each in a container of its own, as two machines on one network.
They know each other by name; any port is free; both see their own files only."""

import sys

CURL = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*"]


def test_the_client_fetches_a_page_from_the_server(nsbox_container_factory):
    server = nsbox_container_factory("server")
    client = nsbox_container_factory("client")

    server.write_text("/srv/index.html", "hello from the server\n")
    server.popen([sys.executable, "-m", "http.server", "80", "--directory", "/srv"])
    server.wait_for_port(80)

    page = client.run([*CURL, "http://server/"], check=True)
    assert page.stdout == "hello from the server\n"


def test_the_client_says_so_when_the_server_is_down(nsbox_container_factory):
    nsbox_container_factory("server")
    client = nsbox_container_factory("client")

    page = client.run([*CURL, "http://server/"])
    assert page.returncode == 7  # curl: failed to connect
    assert "Failed to connect to server" in page.stderr
