"""Real training with transport p2p: what arrives, what a loss of a machine costs, and what a broken connection does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.strategies.jobs import Job, Outcome, assert_same_training

MakeJob = Callable[..., Job]
Undisturbed = Callable[..., Outcome]
TRAINING = Path(__file__).with_name("p2p_training.py")
P2P = {"transport": "p2p", "schedule": "eager", "commit_wait_s": 10.0, "buffer_bytes": 4 * 4099, "sub_buffers": 4}


def test_a_lost_machine_comes_back_from_what_p2p_brought(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    job = make_job(machines=2, nproc=1, strategy=P2P)
    stopped = job.run(stop={"hook": "on_train_batch_start", "step": 9}, script=TRAINING)
    for rank in range(2):
        seen = stopped.of("replica", rank)
        assert [record["version"] for record in seen] == list(range(seen[0]["version"], 8)), seen
        assert all(record["equal"] and record["working"] and record["held"] for record in seen), seen
        assert 0 < seen[-1]["peak_bytes"] <= P2P["buffer_bytes"], seen[-1]  # type: ignore[operator]
    job.kill_agent(1)
    outcome = job.run(script=TRAINING)
    tiers = [outcome.records[rank][0]["tier"] for rank in range(2)]
    assert tiers == ["local_memory", "remote_memory"], outcome.output
    assert outcome.start["step"] >= 7
    assert_same_training(undisturbed(machines=2, nproc=1), job.attempts)


def test_tcp_takes_over_when_a_connection_breaks(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    job = make_job(machines=2, nproc=1, strategy=P2P)
    job.env["P2P_BREAK_AT"] = "6"
    outcome = job.run(script=TRAINING)
    assert outcome.output.count("travel over tcp until the workers start anew") == 1, outcome.output
    for rank in range(2):
        seen = outcome.of("replica", rank)
        assert all(record["equal"] for record in seen), seen
        assert seen[-1]["version"] >= 13, seen
    broken = [record for record in outcome.of("replica", 0) if not record["working"]]
    assert broken
    assert not any(record["held"] for record in broken)
    assert all(record["working"] for record in outcome.of("replica", 1)), "the other direction goes on"
    assert_same_training(undisturbed(machines=2, nproc=1), job.attempts)
