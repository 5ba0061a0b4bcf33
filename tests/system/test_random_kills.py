"""A script that nobody prepared, under SIGKILLs at random moments, ends with the bits of an undisturbed run."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.system.conftest import NODES, Training

Train = Callable[..., Training]
Undisturbed = Callable[..., list[dict[str, Any]]]


def strike(run: Training, draw: random.Random, kind: str, node: int, progress: int = 1) -> dict[str, Any]:
    """Kills at a random moment after training has made some progress."""
    run.until_step(run.step() + progress)
    time.sleep(draw.uniform(0.0, 0.3))
    return run.kill(kind, node)


def assert_faults(run: Training, kinds: list[str]) -> None:
    """Every kill took place, and each was noticed and recovered from."""
    assert [event["kind"] for event in run.events("fault_injected")] == kinds
    assert len(run.events("failure_detected")) == len(kinds)
    assert len(run.events("generation_started")) == len(kinds) + 1
    assert [event["success"] for event in run.events("job_finished")] == [True]


def restored(run: Training) -> list[list[dict[str, Any]]]:
    """What the ranks restored, recovery by recovery."""
    events = run.events("restored")
    generations = sorted({event["generation"] for event in events})
    return [[event for event in events if event["generation"] == generation] for generation in generations]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["1"])  # 2 has its kills below, 3 in the soak
def test_workers_and_nodes(train: Train, undisturbed: Undisturbed, seed: int, stage: str) -> None:
    draw = random.Random(seed + int(stage))
    run = train(f"gemini_stage_{stage}")
    kills = [("software", draw.randrange(NODES)), ("hardware", 0), ("hardware", draw.randrange(1, NODES))]
    draw.shuffle(kills)
    steps = [strike(run, draw, kind, node, progress=draw.randint(1, 4))["at_step"] for kind, node in kills]
    run.hurry()
    assert run.wait(180) == 0, run.output.read_text()
    run.assert_clean()
    assert_faults(run, [kind for kind, _ in kills])
    recoveries = restored(run)
    assert len(recoveries) == len(steps)
    for ranks, step in zip(recoveries, steps, strict=True):
        assert len(ranks) == NODES
        assert len({event["version"] for event in ranks}) == 1
        assert ranks[0]["version"] >= step - 2, "a step, and one without a version while idle time is measured"
        assert {event["tier"] for event in ranks} <= {"local_memory", "remote_memory"}
    assert run.results() == undisturbed(stage)


@pytest.mark.timeout(900)
def test_twenty_kills_in_a_row(train: Train, undisturbed: Undisturbed, seed: int) -> None:
    draw = random.Random(seed)
    run = train("gemini_stage_2", epochs=40)
    kinds = [draw.choice(["software", "software", "hardware"]) for _ in range(20)]
    for kind in kinds:
        strike(run, draw, kind, draw.randrange(NODES))
    run.hurry()
    assert run.wait(300) == 0, run.output.read_text()
    run.assert_clean()
    assert_faults(run, kinds)
    assert run.results() == undisturbed("2", 40)


@pytest.mark.timeout(600)
def test_the_loss_of_a_whole_group(train: Train, undisturbed: Undisturbed) -> None:
    run = train(json.dumps({"stage": 1, "persist_every_s": 0.2}))
    run.until(lambda: (run.path / "persistent" / "latest").exists(), 120)
    run.until_step(run.step() + 2)
    run.kill("hardware", 0, 1)  # two replicas in groups of two: nobody else holds their shards
    run.hurry()
    assert run.wait(180) == 0, run.output.read_text()
    run.assert_clean()
    assert_faults(run, ["hardware"])
    assert [event["nodes_lost"] for event in run.events("failure_detected")] == [[0, 1]]
    assert {event["tier"] for event in run.events("restored")} == {"persistent"}
    assert len(run.events("restored")) == NODES
    assert run.results() == undisturbed("1")
