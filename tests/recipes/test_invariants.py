"""Runs that are as they must be, and runs that are wrong in exactly one way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import invariants
import pytest
import report
import soak_summary

from .written_run import WrittenRun

HOLDERS = ((0, 1), (1, 0), (2, 3), (3, 2))
PERSISTENT = dict.fromkeys(range(4), "persistent")


def found(run: WrittenRun) -> list[str]:
    return invariants.violations(report.read_run(run.folder), HOLDERS)


def flip(run: WrittenRun, owner: int, node: int, version: int) -> None:
    about = {"owner": owner, "node": node, "nodes": [node], "version": version, "version_generation": run.generation}
    run.event("fault_injected", kind="corrupt", signal=None, pids=[1], **about)


def good(run: WrittenRun) -> None:
    run.train(8).fail("software", [1], 8, {}).train(16)
    run.fail("hardware", [2], 16, {2: "remote_memory"}).train(24)
    run.fail("group", [0, 1], 20, PERSISTENT).train(30)
    flip(run, 3, 3, 30)
    run.fail("software", [0], 30, {3: "remote_memory"}).train(35)
    for node in (2, 3):
        flip(run, 3, node, 35)
    run.fail("software", [0], 34, {}).train(40)
    flip(run, 3, 2, 40)
    run.fail("hardware", [3], 32, PERSISTENT).train(42)


def test_a_run_that_recovers_as_it_must_breaks_nothing(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    good(run)
    assert found(run) == []


def restores_something_older(run: WrittenRun) -> None:
    run.train(8).fail("hardware", [1], 7, {1: "remote_memory"}).train(9)


def falls_back_for_no_reason(run: WrittenRun) -> None:
    run.train(8).fail("hardware", [1], 5, PERSISTENT).train(9)


def falls_back_for_a_flip_that_another_holder_has_not(run: WrittenRun) -> None:
    run.train(8)
    flip(run, 1, 1, 8)
    run.fail("software", [1], 5, PERSISTENT).train(9)


def falls_back_for_a_flip_long_ago(run: WrittenRun) -> None:
    run.train(8)
    flip(run, 1, 0, 8)
    run.train(20).fail("hardware", [1], 5, PERSISTENT).train(9)


def starts_from_scratch(run: WrittenRun) -> None:
    run.train(8)
    run.generation, run.step = 2, 0
    run.event("generation_started")
    run.train(3)


def starts_from_scratch_although_something_is_on_disk(run: WrittenRun) -> None:
    run.train(8).event("persisted", version=6, seconds=0.1)
    lose_a_group_and_start_from_scratch(run)


def lose_a_group_and_start_from_scratch(run: WrittenRun) -> None:
    run.event("fault_injected", kind="group", nodes=[0, 1], node=0, pids=[1, 2], signal="SIGKILL")
    run.generation, run.step = run.generation + 1, 0
    run.event("generation_started")
    run.train(3)


def leaves_a_step_out(run: WrittenRun) -> None:
    run.train(8).fail("software", [1], 8, {})
    run.step = 9
    run.train(12)


def trains_a_step_twice(run: WrittenRun) -> None:
    run.train(8)
    run.step = 7
    run.train(9)


def starts_a_generation_twice(run: WrittenRun) -> None:
    run.train(8)
    run.event("generation_started")


def loads_two_versions(run: WrittenRun) -> None:
    run.train(8).fail("software", [1], 8, {})
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    lines[-1]["version"] = 7
    (run.folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def restores_twice(run: WrittenRun) -> None:
    run.train(8).fail("software", [1], 8, {})
    run.event("restored", rank=2, version=8, tier="local_memory", seconds=0.1)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (restores_something_older, "restored version 7, older than committed 8"),
        (falls_back_for_no_reason, "restored from persistent although every shard of version 8"),
        (falls_back_for_a_flip_that_another_holder_has_not, "restored from persistent although"),
        (falls_back_for_a_flip_long_ago, "restored from persistent although"),
        (starts_from_scratch, "started from scratch although version 8 was committed"),
        (starts_from_scratch_although_something_is_on_disk, "started from scratch although version 8 was committed"),
        (leaves_a_step_out, "rank 0: expected steps from 9 on, found 10"),
        (trains_a_step_twice, "rank 0: expected steps from 1 on"),
        (starts_a_generation_twice, "generation 1 started after generation 1"),
        (loads_two_versions, "ranks restored different versions"),
        (restores_twice, "rank 2 restored more than once"),
    ],
)
def test_each_wrong_is_seen(write: Callable[[WrittenRun], None], words: str, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    write(run)
    assert any(words in violation for violation in found(run)), found(run)


def test_a_machine_that_was_given_up_counts_as_lost(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path).train(8)
    run.event("failure_detected", kind="hardware", nodes_lost=[1], detail="does not answer")
    run.fail("hardware", [0], 3, PERSISTENT).train(9)
    assert found(run) == []


def test_without_holders_and_without_a_checkpoint_on_disk_it_may_start_from_scratch(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path).train(8)
    lose_a_group_and_start_from_scratch(run)
    assert found(run) == []


def test_the_summary_has_the_numbers(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    good(run)
    run.event("fault_missed", kind="etcd", nodes=[], reason="none runs")
    summary = soak_summary.summarise(report.read_run(run.folder))
    assert summary["faults"] == {"software": 3, "hardware": 2, "group": 1, "corrupt": 4}
    assert summary["missed"] == {"etcd": 1}
    assert summary["recoveries"] == {"local_memory": 2, "remote_memory": 2, "persistent": 2}
    assert summary["lost_steps"] == {"sum": 4 + 1 + 8, "worst": 8}
    assert (summary["generations"], summary["last_step"]) == (7, 42)
    assert summary["seconds_of"]["detect"]["median"] == pytest.approx(2.0)
    assert summary["seconds_of"]["total"]["worst"] == pytest.approx(4.3)
    shown = soak_summary.text({**summary, "violations": [], "seconds": 5.0})
    assert "faults: 10 (4 corrupt, 1 group, 2 hardware, 3 software); missed: 1" in shown
