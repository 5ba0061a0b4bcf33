"""The experiment that measures what profiling costs: its arithmetic, and one very short run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import profiler_cost
import pytest
from turns import Turn

SCRIPT = Path(profiler_cost.__file__)


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


def test_it_measures_real_training(tmp_path: Path) -> None:
    size = ["--rounds", "2", "--block", "2", "--layers", "2", "--width", "16", "--wait-ms", "0"]
    command = [sys.executable, str(SCRIPT), *size, "--dir", str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["iterations"] for row in result["rows"]] == [4, 4]
    assert result["collectives_per_iteration"] > 4
    assert 0 < result["blocking_s"] < 1e-3
    assert "overhead" in ran.stdout
