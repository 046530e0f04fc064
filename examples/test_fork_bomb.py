"""A fork bomb, which on the bare machine would take every process there is.
pids= stops it, its neighbour goes on working, and the end of the test takes it away."""

import sys

import pytest

BOMB = "import os\nwhile True: os.fork()"


@pytest.mark.sandbox(pids=32)
def test_a_fork_bomb_is_stopped(nsbox_container_factory):
    container = nsbox_container_factory("bomb")
    neighbour = nsbox_container_factory("neighbour")

    bomb = container.popen([sys.executable, "-c", BOMB])
    container.wait_for_log("Resource temporarily unavailable", process=bomb)

    assert container.stats().pids <= 32
    assert neighbour.run(["echo", "all is well"], check=True).stdout == "all is well\n"
