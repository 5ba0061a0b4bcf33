"""Links between machines with cables of their own: how fast they are, and what happens when one is pulled."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
from namespaces import Namespaces, why_not  # noqa: E402

RATE_MBIT = 200


@pytest.fixture
def machines() -> Iterator[Namespaces]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Namespaces(2, f"{RATE_MBIT}mbit", "256kb") as made:
        yield made


@contextlib.contextmanager
def end_of_link(machines: Namespaces, machine: int, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Runs one end; it ends with its input."""
    command = machines.command(machine, sys.executable, "-m", "tests.dataplane.link_end", *words)
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(30) == 0
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_limited_cable_is_as_fast_as_its_limit(machines: Namespaces) -> None:
    """Beyond the 256 kB that its token bucket lets through at once; 4 % are headers."""
    address = machines.address(1)
    with (
        end_of_link(machines, 1, "serve", address) as server,
        end_of_link(machines, 0, "measure", address, line_of(server)) as sender,
    ):
        bandwidth, startup_s = json.loads(line_of(sender))
    assert 0.85 * RATE_MBIT < bandwidth * 8 / 1e6 < 1.1 * RATE_MBIT
    assert 0 < startup_s < 0.05


def test_links_measured_both_ways_at_once_are_as_fast_as_their_limits(machines: Namespaces) -> None:
    """Every answer to a probe waits behind the probes that go its way."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(end_of_link(machines, at, "serve", machines.address(at))) for at in (0, 1)]
        ports = [line_of(server) for server in servers]
        ends = [end_of_link(machines, at, "measure", machines.address(1 - at), ports[1 - at]) for at in (0, 1)]
        senders = [stack.enter_context(end) for end in ends]
        for sender in senders:
            bandwidth, _ = json.loads(line_of(sender))
            assert 0.85 * RATE_MBIT < bandwidth * 8 / 1e6 < 1.1 * RATE_MBIT


def test_a_silent_sender_whose_machine_vanishes_is_given_up(machines: Namespaces) -> None:
    """A paced sender may be silent as long as it likes, so that no timeout finds this; its kernel's silence does."""
    address = machines.address(1)
    with (
        end_of_link(machines, 1, "serve", address, "", "impatient") as server,
        end_of_link(machines, 0, "begin", address, line_of(server)) as sender,
    ):
        assert line_of(sender) == "begun"
        machines.cut(0)
        assert server.stdin is not None
        server.stdin.write("cut\n")
        server.stdin.flush()
        assert line_of(server) == "given up"


def test_what_has_left_a_machine_is_known_before_its_peer_acknowledges_it(machines: Namespaces) -> None:
    """Acknowledgements wait behind what the peer sends itself."""
    address, port = machines.address(1), "29400"  # the machines are the test's own
    with end_of_link(machines, 1, "meet", address, port, "listen") as there:
        assert line_of(there) == "listening"
        with end_of_link(machines, 0, "meet", address, port, "connect") as here:
            for end in (here, there):
                found = json.loads(line_of(end))
                assert all(0 <= queued <= in_flight for in_flight, queued in found)
                assert any(queued > 0 for _, queued in found)
                assert any(queued < in_flight for in_flight, queued in found)
