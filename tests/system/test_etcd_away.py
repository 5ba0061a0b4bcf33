"""etcd is off the iteration path: training does not notice that it is away, and recoveries wait for it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from lightning_gemini.controlplane.processes import wait_gone
from tests.system.conftest import Training

Train = Callable[..., Training]
Undisturbed = Callable[..., list[dict[str, Any]]]
SHAPE = {"nodes": 2, "epochs": 9}  # 180 batches of each rank
SLEEP_S = 0.6
OUTAGE_S = 60.0


def etcd_pids(run: Training) -> list[int]:
    pids: list[int] = json.loads((run.path / "etcd" / "pids.json").read_text())
    return pids


def batch_seconds(run: Training, start: float, end: float) -> list[float]:
    """Durations of the batches that rank 0 completed in a span of time; none of them was lost or done twice."""
    done = [(number, when) for number, when in run.times() if start <= when <= end]
    assert [number for number, _ in done] == list(range(done[0][0], done[0][0] + len(done)))
    return [after - before for (_, before), (_, after) in itertools.pairwise(done)]


def assert_as_fast(before: list[float], during: list[float], sleep_s: float) -> None:
    """Loosely, for the machine does other things as well; what a batch sleeps does not count."""
    before, during = ([seconds - sleep_s for seconds in batches] for batches in (before, during))
    for name, batches in (("before", before), ("during", during)):
        median, longest = statistics.median(batches), max(batches)
        print(f"{name}: {len(batches)} batches, median {median * 1e3:.0f} ms, longest {longest * 1e3:.0f} ms")
    assert statistics.median(during) < 2 * statistics.median(before) + 0.05
    assert max(during) < 2 * max(before) + 1.0


@pytest.mark.timeout(480)
def test_a_minute_without_etcd_and_a_worker_that_dies_without_it(train: Train, undisturbed: Undisturbed) -> None:
    run = train("gemini_stage_2", seconds=SLEEP_S, **SHAPE)
    run.until_step(2)
    started = time.time()
    run.until_step(run.step() + 7)
    (etcd,) = etcd_pids(run)
    paused = time.time()
    os.kill(etcd, signal.SIGSTOP)
    try:
        first = run.committed()
        run.until(lambda: time.time() > paused + OUTAGE_S, OUTAGE_S + 10)
        steps, committed = run.step(), run.committed()
    finally:
        os.kill(etcd, signal.SIGCONT)
    assert committed >= steps - 2, "versions are committed as ever"
    during = batch_seconds(run, paused, paused + OUTAGE_S)
    assert committed - first > 0.4 * len(during), "two batches are a step"
    assert_as_fast(batch_seconds(run, started, paused), during, SLEEP_S)
    # Every lease had ended. The agents take their places again, and nobody takes anybody for dead.
    run.until(lambda: "opened another one" in _logs(run), 15)
    run.until_step(run.step() + 4)
    assert len(run.events("generation_started")) == 1
    assert not run.events("failure_detected")

    os.kill(etcd, signal.SIGSTOP)
    run.kill("software", 1)
    run.until(lambda: run.events("worker_exit"))
    time.sleep(2.0)
    assert len(run.events("generation_started")) == 1, "nobody can order anything"
    os.kill(etcd, signal.SIGKILL)
    assert not wait_gone([etcd], 5)
    run.until(lambda: len(run.events("restored")) == 2)
    assert etcd_pids(run) not in ([], [etcd])
    run.hurry()
    assert run.wait(120) == 0, run.output.read_text()
    run.assert_clean()
    assert [event["kind"] for event in run.events("failure_detected")] == ["software"]
    assert {event["tier"] for event in run.events("restored")} == {"local_memory"}
    assert run.results() == undisturbed("2", **SHAPE)


def _logs(run: Training) -> str:
    return "".join(path.read_text() for path in (run.path / "logs").glob("*agent.jsonl"))


@pytest.mark.timeout(300)
def test_one_of_three_members_dies_and_nothing_happens(train: Train, undisturbed: Undisturbed) -> None:
    run = train("gemini_stage_2", seconds=0.2, etcd_members="3", **SHAPE)
    run.until_step(3)
    started = time.time()
    run.until_step(run.step() + 12)
    members = etcd_pids(run)
    assert len(members) == 3
    struck = time.time()
    os.kill(members[0], signal.SIGKILL)  # the one that everybody speaks to first
    assert not wait_gone(members[:1], 5)
    run.until(lambda: len(now := etcd_pids(run)) == 3 and now != members)
    run.until_step(run.step() + 12)
    assert_as_fast(batch_seconds(run, started, struck), batch_seconds(run, struck, time.time()), 0.2)
    run.ports |= run.listening()
    run.hurry()
    assert run.wait(120) == 0, run.output.read_text()
    run.assert_clean()
    assert len(run.events("generation_started")) == 1
    assert not run.events("failure_detected")
    assert "lease on the key-value store had ended" not in _logs(run)
    assert run.results() == undisturbed("2", **SHAPE)
