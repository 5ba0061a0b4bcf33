"""Beside the user's own checkpoints, restarts of a launcher, several fits, and what comes after a fit."""

from __future__ import annotations

from collections.abc import Callable

from tests.strategies.jobs import Job, Outcome, assert_same_training

MakeJob = Callable[..., Job]
Undisturbed = Callable[..., Outcome]
CHECKPOINTS = {"callbacks": ["checkpoint"], "scheduler": "cosine"}
KILL = {"hook": "on_train_batch_end", "step": 8}


def checkpoint(job: Job, step: int) -> str:
    (path,) = (job.directory / "out" / "checkpoints").glob(f"*step={step}.ckpt")
    return str(path)


def test_the_users_checkpoint_wins_over_memory_and_says_so(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    options = {"strategy": "gemini_stage_2", **CHECKPOINTS}
    job = make_job(**options)
    job.run(stop=KILL)
    outcome = job.run(ckpt_path=checkpoint(job, 6))
    assert outcome.ended, outcome.output
    assert outcome.start["step"] == 6
    assert outcome.start["tier"] is None
    assert "wins over version" in outcome.output
    assert outcome.of("train")[0]["step"] == 7
    assert len(outcome.of("train")) == 9
    # What Lightning's own checkpoint cannot bring back exactly (random numbers) aside, it is the same training.
    reference = undisturbed(**options).of("train")[6:]
    assert [record["step"] for record in outcome.of("train")] == [record["step"] for record in reference]
    assert [record["rates"] for record in outcome.of("train")] == [record["rates"] for record in reference]


def test_memory_survives_a_run_from_the_users_checkpoint(make_job: MakeJob) -> None:
    job = make_job(strategy="gemini_stage_1", machines=2, nproc=1, **CHECKPOINTS)
    job.run(stop=KILL)
    first = job.run(ckpt_path=checkpoint(job, 3), stop={"hook": "on_train_batch_end", "step": 6})
    assert first.start["step"] == 3
    again = job.run()
    assert again.ended, again.output
    assert again.start["step"] in (4, 5), "goes on from the newest training, not from the step numbers of the older one"
    seen = {record["step"]: record for record in first.of("train")}
    for record in again.of("train"):
        assert seen.get(record["step"], record) == record


def test_a_checkpoint_saved_while_a_version_is_read_is_whole(make_job: MakeJob) -> None:
    options = {"strategy": "gemini_stage_3", "trainer": {"max_epochs": 1}}
    job, other = make_job(**options, callbacks=["save-meanwhile"]), make_job(**options)
    outcome = job.run()
    assert outcome.ended, outcome.output
    resumed = other.run(ckpt_path=checkpoint(job, 3))
    assert resumed.ended, resumed.output
    assert [record["step"] for record in resumed.of("train")] == [4, 5]


def test_a_launchers_restart_carries_on_from_memory(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    options = {"strategy": "gemini_stage_3", **CHECKPOINTS}
    job = make_job(**options)
    job.run(stop=KILL)
    job.env["TORCHELASTIC_RESTART_COUNT"] = "1"
    outcome = job.run(ckpt_path=checkpoint(job, 3))
    assert outcome.start["tier"] == "local_memory"
    assert outcome.start["step"] >= 6
    assert_same_training(undisturbed(**options), job.attempts)


def test_evaluation_after_a_fit(make_job: MakeJob) -> None:
    options = {"val_batches": 2, "after": ["validate", "test"], "strategy": "gemini_stage_3"}
    job, other = make_job(**options), make_job(**options)
    job.run(stop=KILL)
    outcome, reference = job.run(), other.run()
    assert outcome.ended, outcome.output
    for function in ("validate", "test"):
        assert outcome.of(function) == reference.of(function)
        assert outcome.of(function)[0]["val_loss"] > 0


def test_a_script_that_fits_twice(make_job: MakeJob) -> None:
    options = {"strategy": {"stage": 2}, "after": ["fit"], "trainer": {"max_epochs": 2}}
    job, other = make_job(**options), make_job(**options)
    reference = other.run()
    assert reference.ended, reference.output
    assert len(reference.of("end")) == 2
    job.run(stop={"hook": "on_train_batch_end", "step": 7})
    outcome = job.run()
    assert outcome.ended, outcome.output
    assert outcome.of("end") == reference.of("end")


def test_a_script_that_is_killed_in_its_second_fit(make_job: MakeJob) -> None:
    options = {"strategy": {"stage": 2}, "after": ["fit"], "trainer": {"max_epochs": 2}}
    job, other = make_job(**options), make_job(**options)
    reference = other.run()
    job.run(stop={"hook": "on_train_batch_end", "step": 7, "fit": 1})
    outcome = job.run()
    assert outcome.ended, outcome.output
    starts = outcome.of("start")
    assert starts[0]["tier"] is None, "memory is that of the second fit: the first one starts again"
    assert outcome.of("end") == reference.of("end")


def test_versions_can_be_turned_off(make_job: MakeJob) -> None:
    job = make_job(strategy={"stage": 3, "checkpoint_every": 0})
    job.run(stop=KILL)
    assert job.agents() == []
    outcome = job.run()
    assert outcome.ended, outcome.output
    assert outcome.start["step"] == 0


def test_a_loader_that_cannot_go_on_is_trained_with_a_warning(make_job: MakeJob) -> None:
    job = make_job(loader="iterable", strategy="gemini_stage_1")
    job.run(stop=KILL)
    assert "has no state_dict and load_state_dict" in job.attempts[0].output
    outcome = job.run()
    assert outcome.ended, outcome.output
    assert outcome.start["step"] >= 6


def test_memory_outlives_an_exception_of_the_script(make_job: MakeJob, undisturbed: Undisturbed) -> None:
    job = make_job(strategy="gemini_stage_2")
    failed = job.run(fail={"hook": "on_train_batch_end", "step": 8})
    assert [end.code for end in failed.exits] == [1, 1], failed.output
    assert "the user's callback failed" in failed.output
    outcome = job.run()
    assert outcome.start["tier"] == "local_memory"
    assert outcome.start["step"] >= 6
    assert_same_training(undisturbed(strategy="gemini_stage_2"), job.attempts)
