"""Training that is killed and started again ends with the very bits of training that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.strategies.jobs import Job, Outcome, assert_same_training

MakeJob = Callable[..., Job]
Undisturbed = Callable[..., Outcome]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_basics(make_job: MakeJob, undisturbed: Undisturbed, stage: int) -> None:
    options = {"strategy": f"gemini_stage_{stage}", "scheduler": "cosine"}
    job = make_job(**options)
    job.run(stop={"hook": "on_train_batch_end", "step": 7})
    outcome = job.run()
    assert outcome.ended, outcome.output
    assert outcome.start["tier"] == "local_memory"
    assert outcome.start["step"] in (5, 6)
    assert_same_training(undisturbed(**options), job.attempts)
    assert job.agents() == []
