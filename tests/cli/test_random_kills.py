"""Many kills in a row, at any moment, also while the cluster still recovers from the last one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gemini.cli.inject import inject_nodes
from tests.cli.conftest import Run
from tests.cli.scripts import UNTIL_FILE


@pytest.mark.timeout(180)
def test_random_kills_end_with_the_job_done(
    start: Callable[..., Run], tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    run = start(UNTIL_FILE, str(tmp_path / "enough"), nodes=3, nproc=2, max_failures="100")
    run.until_running(1, workers=6)
    pids = []
    for _ in range(8):
        kind = draw.choice(["software", "hardware"])
        nodes = [draw.randrange(3)] if kind == "software" else draw.sample(range(3), draw.choice([1, 1, 2]))
        pids += inject_nodes(run.path, kind, nodes, timeout_s=60)["pids"]
        time.sleep(draw.uniform(0.0, 1.5))
    (tmp_path / "enough").touch()
    assert run.wait(90) == 0, run.output.read_text()
    run.assert_nothing_left()
    faults, failures = run.events("fault_injected"), run.events("failure_detected")
    assert len(faults) == 8
    assert 1 <= len(failures) <= 8
    finished = {event["rank"] for event in run.events("worker_exit") if event["code"] == 0 and not event["expected"]}
    assert finished == set(range(6))
