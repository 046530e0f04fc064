"""What a victim that is a run of pytest runs."""

from __future__ import annotations

import os
from typing import Any

import pytest


@pytest.mark.sandbox(memory="64M")
@pytest.mark.parametrize("number", range(6))
def test_inside(number: int) -> None:
    open("/etc/written", "w").close()
    os.system("sleep 0.05")


@pytest.mark.parametrize("number", range(6))
def test_beside(nsbox_container_factory: Any, nsbox_network_factory: Any, number: int) -> None:
    lan = nsbox_network_factory("lan", subnet="10.9.0.0/24", internet=False)
    a = nsbox_container_factory("a", memory="64M", cpus=1)
    b = nsbox_container_factory("b", networks=[lan], disk="8M")
    for container in (a, b):
        container.popen("setsid sleep 1000 & sleep 1000", shell=True)
        container.run(["true"], check=True)
