"""Schedules of faults on the virtual cluster, and proofs that the simulator finds what is wrong and replays it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
SCHEDULES = 1200
SEARCHED = 200
"""Within how many seeds every known bad protocol must be found."""


def simulate(*arguments: object, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the modules under test get another clock, network and kernel there."""
    command = [sys.executable, "-m", "tests.simulation", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def fingerprint(output: str) -> str:
    found = re.search(r"^fingerprint .*$", output, re.MULTILINE)
    assert found, output
    return found[0]


@pytest.mark.timeout(900)
def test_no_schedule_breaks_a_promise() -> None:
    result = simulate("--seeds", SCHEDULES)
    print(result.stdout[-6000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert f"{SCHEDULES} schedules" in result.stdout
    for fault in ("worker killed", "machine lost", "root lost", "agent paused", "cluster cut in two", "store away"):
        assert re.search(rf"faults: .*{fault} \d{{2,}}", result.stdout), f"hardly any schedule had {fault}"
    for tier in ("local_memory", "remote_memory", "persistent"):
        assert re.search(rf"starts: .*{tier} \d+", result.stdout), f"nothing was ever restored from {tier}"


@pytest.mark.timeout(300)
def test_a_large_cluster_recovers() -> None:
    result = simulate("--machines", 48, "--seeds", 2, timeout_s=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_a_known_bad_protocol_is_found(mutation: str) -> None:
    result = simulate("--mutation", mutation, "--seeds", SEARCHED, timeout_s=280)
    assert result.returncode == 1, f"{SEARCHED} schedules did not find {mutation}:\n{result.stdout}{result.stderr}"
    assert re.search(r"seed \d+: Invariant [123]", result.stdout), result.stdout[-3000:] + result.stderr


@pytest.mark.timeout(120)
def test_a_seed_replays_exactly() -> None:
    first, again = (simulate("--seed", 11, timeout_s=100) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr
    assert fingerprint(first.stdout) == fingerprint(again.stdout)
    assert first.stdout == again.stdout
    assert fingerprint(simulate("--seed", 12).stdout) != fingerprint(first.stdout)


def test_nothing_that_is_simulated_uses_the_real_clock() -> None:
    program = "from tests.simulation import cluster, swap; print(*swap.left_real())"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stdout.split(), "add these modules to tests/simulation/swap.py"
