"""A job that keeps every record it has seen, against one that lets go of them.
memory= ends the leak at 64 MiB, the result says why, and the machine does not notice."""

import sys

import pytest

LEAKS = """
seen = []
while True:
    seen.append(bytearray(1 << 20))
"""

LETS_GO = """
for record in range(200):
    seen = bytearray(1 << 20)
"""


@pytest.mark.sandbox(memory="64M")
def test_a_leak_is_caught(nsbox_container):
    result = nsbox_container.run([sys.executable, "-c", LEAKS])
    assert result.oom_killed


@pytest.mark.sandbox(memory="64M")
def test_a_job_without_a_leak_runs_to_its_end(nsbox_container):
    result = nsbox_container.run([sys.executable, "-c", LETS_GO], check=True)
    assert not result.oom_killed
    assert result.usage.peak_memory < 64 << 20
