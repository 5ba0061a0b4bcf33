"""The experiment that measures what profiling costs: its arithmetic, and the cost of a single collective."""

from __future__ import annotations

import random

import profiler_cost
import pytest
from turns import Turn


def measured(part: float, draw: random.Random) -> list[tuple[Turn, float]]:
    """Rounds of a machine that slows down all the time, where profiling adds ``part``."""
    found = []
    for number in range(20):
        for scheme, factor in ((profiler_cost.WITHOUT, 1.0), (profiler_cost.WITH, 1.0 + part)):
            base_s = 0.1 * (1 + 0.05 * number) * factor
            turn = Turn(scheme, number, False, True)
            found += [(turn, base_s * draw.uniform(0.99, 1.01)) for _ in range(10)]
    return found


@pytest.mark.parametrize("part", [0.0, 0.03])
def test_the_overhead_is_found_in_spite_of_a_drift(part: float, seed: int) -> None:
    found, low, high = profiler_cost.overhead(measured(part, random.Random(seed)), seed)
    assert found == pytest.approx(part, abs=0.006)
    assert low <= found <= high
    assert high - low < 0.02


def test_a_row_has_median_and_quartiles() -> None:
    turn = Turn(profiler_cost.WITH, 0, False, True)
    seconds = [(turn, 1.0 + index) for index in range(7)]
    row = profiler_cost.row(profiler_cost.WITH, seconds, seconds[:3])
    assert row == {
        "tap": "with",
        "iterations": 7,
        "iteration_s_median": 4.0,
        "iteration_s_low": 2.0,
        "iteration_s_high": 6.0,
        "cpu_s_median": 2.0,
    }


def test_recording_one_collective_takes_microseconds() -> None:
    costs = profiler_cost.costs_of_one()
    assert costs.keys() == {"blocking_s", "asynchronous_s", "trace_s"}
    assert all(0 < cost_s < 1e-3 for cost_s in costs.values()), costs
