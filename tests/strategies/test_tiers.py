"""Where a run resumes from when memory is lost or damaged, and what the persistent tier leaves for others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gemini.dataplane.slab import Buffer
from tests.strategies.jobs import Job, Outcome, assert_same_training

MakeJob = Callable[..., Job]
Undisturbed = Callable[..., Outcome]
FROZEN = {"model.0.0.weight", "model.0.0.bias"}
TRAINED = {"model.0.2.weight", "model.0.2.bias", "model.1.weight", "model.1.bias"}
STOP = {"hook": "on_train_batch_end", "step": 9}


def persisting(directory: Path, stage: int, **more: Any) -> dict[str, Any]:
    """A version a step, each of which also goes to the persistent tier as soon as its predecessor is there."""
    strategy = {"stage": stage, "persist_dir": str(directory / "persist"), "persist_every_s": 0.01, **more}
    return {
        "strategy": strategy,
        "scheduler": "cosine",
        "body": ["batchnorm", "dropout"],
        "frozen": True,
        "pace_s": 0.1,
        "weights": True,
    }


def saved(directory: Path) -> list[int]:
    names = [path.name for path in (directory / "persist").glob("global_step*")]
    return sorted(int(name.removeprefix("global_step").partition(".")[0]) for name in names)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lost_memory_is_restored_from_disk(
    make_job: MakeJob, undisturbed: Undisturbed, tmp_path: Path, stage: int
) -> None:
    options = persisting(tmp_path, stage)
    job = make_job(**options)
    job.run(stop=STOP)
    job.kill_agent()
    outcome = job.run()
    assert outcome.start["tier"] == "persistent", outcome.output
    assert 1 <= outcome.start["version"] <= 9
    assert "from version" in outcome.output
    assert_same_training(undisturbed(**{**options, "strategy": {"stage": stage}, "pace_s": 0.0}), job.attempts)


def test_the_interval_of_the_persistent_tier_goes_on_over_recoveries(make_job: MakeJob, tmp_path: Path) -> None:
    hour_s = 3600.0
    job = make_job(**persisting(tmp_path, 1, persist_every_s=hour_s))
    job.run(stop={**STOP, "step": 3})
    assert job.run(stop={**STOP, "step": 6}, clock_ahead_s=0.6 * hour_s).start["tier"] == "local_memory"
    assert saved(tmp_path) == []
    outcome = job.run(clock_ahead_s=1.2 * hour_s)
    assert outcome.start["tier"] == "local_memory", outcome.output
    assert len(saved(tmp_path)) == 1, outcome.output


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_others_can_read_the_persistent_tier(make_job: MakeJob, tmp_path: Path, stage: int) -> None:
    job = make_job(**persisting(tmp_path, stage))
    outcome = job.run()
    assert outcome.ended, outcome.output
    versions = saved(tmp_path)
    assert versions, outcome.output
    assert (tmp_path / "persist" / "latest").read_text() == f"global_step{versions[-1]}"
    command = [sys.executable, "persist/zero_to_fp32.py", "persist", "fp32"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    consolidated = torch.load(tmp_path / "fp32" / "pytorch_model.bin", weights_only=True)
    reader = make_job(**persisting(tmp_path, stage))
    read = reader.run_script(Path(__file__).with_name("plain_deepspeed.py"))
    assert read.ended, read.output
    (weights,) = [record["weights"] for record in read.of("plain")]
    left_out = FROZEN if stage == 1 else set()  # by DeepSpeed itself, which notes frozen parameters from stage 2 on
    assert set(weights) == set(consolidated) | left_out
    for name, values in consolidated.items():
        assert torch.equal(torch.tensor(weights[name]), values.float()), name
    universal = tmp_path / "universal" / f"global_step{versions[-1]}" / "zero"
    assert {path.parent.name for path in universal.glob("*/exp_avg.pt")} == TRAINED
    for name in TRAINED:
        stored = torch.load(universal / name / "fp32.pt", weights_only=False)
        converted = stored["param"] if isinstance(stored, dict) else stored  # flat, from stage 3
        assert torch.equal(torch.tensor(weights[name]).flatten(), converted.flatten()), name
    trained = job.attempts[0].of("weights")
    assert [weights] == [record["weights"] for record in trained if record["step"] == versions[-1]]


def test_the_directory_of_a_finished_job_is_no_beginning(make_job: MakeJob, tmp_path: Path) -> None:
    options = persisting(tmp_path, 2)
    job = make_job(**options)
    assert job.run().ended
    kept = saved(tmp_path)
    again = job.run()
    assert again.ended, again.output
    assert again.start == {"kind": "start", "step": 0, "version": None, "tier": None, "seen_on_save": 0}
    assert kept[-1] in saved(tmp_path), "a result is not thinned out by the next job"


def test_a_damaged_checkpoint_on_disk_is_skipped(make_job: MakeJob, undisturbed: Undisturbed, tmp_path: Path) -> None:
    options = persisting(tmp_path, 3)
    job = make_job(**options)
    job.run(stop=STOP)
    job.kill_agent()
    newest = saved(tmp_path)[-1]
    assert len(saved(tmp_path)) == 2
    (damaged,) = (tmp_path / "persist" / f"global_step{newest}").glob("*rank_1*optim_states.pt")
    damaged.write_bytes(damaged.read_bytes()[:100])
    outcome = job.run()
    assert outcome.start["version"] == saved_before(outcome, newest), outcome.output
    assert "cannot be read" in outcome.output
    assert_same_training(undisturbed(**{**options, "strategy": {"stage": 3}, "pace_s": 0.0}), job.attempts)


def saved_before(outcome: Outcome, newest: int) -> int:
    version = int(outcome.start["version"])
    assert 0 < version < newest
    return version


# -- damaged memory ----------------------------------------------------------------------------------------------------


def damage(job: Job, machine: int, owner: int, version: int) -> None:
    """Flips one byte of the middle of a shard in an agent's memory."""
    with job.agent(machine) as client:
        client.join(owner, client.report()["replicas"], client.report()["placement"])
        slab = client.attach_existing()
        assert slab is not None
        buffer = buffer_of(slab.buffers, version)
        buffer.data[buffer.data_bytes // 2] ^= 0xFF


def buffer_of(buffers: tuple[Buffer, Buffer], version: int) -> Buffer:
    (found,) = [buffer for buffer in buffers if buffer.id is not None and buffer.id.version == version]
    return found


def test_a_damaged_copy_gives_way_to_an_older_version(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    job = make_job(strategy="gemini_stage_2")
    job.run(stop=STOP)
    versions = sorted({version for _, version in job.holdings()})
    assert len(versions) == 2, job.holdings()
    damage(job, 0, owner=1, version=versions[-1])
    outcome = job.run()
    assert (outcome.start["version"], outcome.start["tier"]) == (versions[0], "local_memory")
    assert "is corrupt" in outcome.output
    assert_same_training(undisturbed(strategy="gemini_stage_2"), job.attempts)


def test_a_damaged_copy_gives_way_to_that_of_the_peer(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    job = make_job(machines=2, nproc=1)
    job.run(stop={**STOP, "hook": "on_train_batch_start"})
    newest = max(version for _, version in job.holdings(1))
    assert (1, newest) in job.holdings(0), "machine 0 has the replica"
    damage(job, 1, owner=1, version=newest)
    outcome = job.run()
    assert outcome.start["version"] == newest
    assert "is corrupt" in outcome.output
    tiers = [outcome.records[rank][0]["tier"] for rank in range(2)]
    assert tiers == ["local_memory", "remote_memory"]
    assert_same_training(undisturbed(machines=2, nproc=1), job.attempts)


def test_memory_that_is_damaged_everywhere_gives_way_to_disk(
    make_job: MakeJob, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    options = persisting(tmp_path, 1)
    job = make_job(**options)
    job.run(stop=STOP)
    for version in {version for _, version in job.holdings()}:
        damage(job, 0, owner=0, version=version)
    outcome = job.run()
    assert outcome.start["tier"] == "persistent", outcome.output
    assert outcome.output.count("is corrupt") >= 2
    assert_same_training(undisturbed(**{**options, "strategy": {"stage": 1}, "pace_s": 0.0}), job.attempts)


def test_a_lost_machine_is_restored_from_its_peer(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    job = make_job(machines=2, nproc=1, strategy={"stage": 3, "schedule": "eager", "commit_wait_s": 20.0})
    job.run(stop={**STOP, "hook": "on_train_batch_start"})
    job.kill_agent(1)
    outcome = job.run()
    tiers = [outcome.records[rank][0]["tier"] for rank in range(2)]
    assert tiers == ["local_memory", "remote_memory"], outcome.output
    assert outcome.start["step"] >= 7, "version 8 began only once version 7 was committed"
    assert_same_training(undisturbed(machines=2, nproc=1), job.attempts)


def test_an_idle_agent_goes_away(make_job: MakeJob) -> None:
    job = make_job(strategy={"stage": 1, "idle_timeout_s": 1.0})
    job.run(stop={"hook": "on_train_batch_end", "step": 2})
    job.wait_without_agents(15.0)
    outcome = job.run()
    assert json.dumps(outcome.start["tier"]) == "null"
