"""Training that is killed and started again ends with the very bits of training that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.strategies.jobs import Job, Outcome, assert_same_training

MakeJob = Callable[..., Job]
Undisturbed = Callable[..., Outcome]
Place = dict[str, Any]


def end_of(step: int, **more: int) -> Place:
    return {"hook": "on_train_batch_end", "step": step, **more}


TWO_MACHINES = {"machines": 2, "nproc": 1}
SCENARIOS: dict[str, tuple[dict[str, Any], list[Place]]] = {
    "zero1-accumulation-cosine": (
        {"strategy": "gemini_stage_1", "scheduler": "cosine", "trainer": {"accumulate_grad_batches": 2}},
        [end_of(2, batch=4), end_of(5)],  # the third step takes its batches from two epochs
    ),
    "zero2-accumulation-in-the-middle": (
        {
            "strategy": "gemini_stage_2",
            "scheduler": "cosine",
            "trainer": {"accumulate_grad_batches": 3},
            **TWO_MACHINES,
        },
        [{"hook": "on_train_batch_start", "step": 3, "batch": 0, "epoch": 2}],
    ),
    "zero3-accumulation-several-kills": (
        {"trainer": {"accumulate_grad_batches": 2, "max_epochs": 4}, "scheduler": "cosine", **TWO_MACHINES},
        [end_of(2), {"hook": "on_before_zero_grad", "step": 5}, {"hook": "on_train_epoch_end", "epoch": 2}],
    ),
    "zero1-plateau-validation": (
        {
            "strategy": "gemini_stage_1",
            "scheduler": "plateau",
            "val_batches": 2,
            "trainer": {"num_sanity_val_steps": 2},
        },
        [{"hook": "on_validation_batch_start", "epoch": 1, "batch": 1}],
    ),
    "zero3-plateau-epoch-end": (
        {"scheduler": "plateau", "val_batches": 2, "body": ["batchnorm", "dropout"]},
        [{"hook": "on_train_epoch_end", "epoch": 1}, {"hook": "on_train_epoch_start", "epoch": 2}],
    ),
    "zero2-cosine-by-epoch": (
        {"strategy": "gemini_stage_2", "scheduler": "cosine-epoch", "trainer": {"max_epochs": 4}},
        [{"hook": "on_train_epoch_end", "epoch": 0}, end_of(6), end_of(15)],
    ),
    "zero3-clipping": (
        {"scheduler": "cosine", "trainer": {"gradient_clip_val": 0.05}, **TWO_MACHINES},
        [end_of(7)],
    ),
    "zero1-bf16-mixed": (
        {"strategy": "gemini_stage_1", "body": ["layernorm"], "trainer": {"precision": "bf16-mixed"}, "val_batches": 1},
        [end_of(7)],
    ),
    # Under bf16-mixed DeepSpeed leaves buffers in fp32, which torch's BatchNorm refuses on the CPU, with or without us.
    "zero2-bf16-true": (
        {
            "strategy": "gemini_stage_2",
            "body": ["batchnorm", "dropout"],
            "trainer": {"precision": "bf16-true"},
            "val_batches": 1,
        },
        [end_of(7)],
    ),
    "zero3-bf16-mixed": (
        {"body": ["layernorm"], "trainer": {"precision": "bf16-mixed", "gradient_clip_val": 0.05}, **TWO_MACHINES},
        [end_of(7)],
    ),
    "zero1-batchnorm-frozen": (
        {"strategy": "gemini_stage_1", "body": ["batchnorm"], "frozen": True, "val_batches": 2},
        [end_of(7)],
    ),
    "zero3-frozen": ({"body": ["dropout"], "frozen": True, **TWO_MACHINES}, [end_of(3)]),
    "zero1-validation-within-the-epoch": (
        {
            "strategy": "gemini_stage_1",
            "batches": 6,
            "val_batches": 2,
            "scheduler": "cosine",
            "trainer": {"val_check_interval": 0.5},
        },
        [{"hook": "on_validation_batch_end", "step": 9, "batch": 0}, {"hook": "on_validation_end", "step": 15}],
    ),
    "zero2-early-stopping": (
        {
            "strategy": "gemini_stage_2",
            "callbacks": ["early-stopping"],
            "val_batches": 1,
            "batches": 3,
            "trainer": {"max_epochs": 5},
        },
        [end_of(5)],
    ),
    "zero3-model-checkpoint": (
        {"callbacks": ["checkpoint"], "val_batches": 1, "scheduler": "cosine"},
        [end_of(7), {"hook": "on_save_checkpoint", "step": 9}],
    ),
    "zero1-worker-processes": ({"strategy": "gemini_stage_1", "loader": "workers"}, [end_of(7)]),
    "zero2-stateful-loader": (
        {
            "strategy": "gemini_stage_2",
            "loader": "stateful",
            "trainer": {"use_distributed_sampler": False},
            **TWO_MACHINES,
        },
        [end_of(7)],
    ),
    "zero1-stateful-loader-that-lightning-wraps": (
        {"strategy": "gemini_stage_1", "loader": "stateful-wrapped"},
        [end_of(3), end_of(7)],
    ),
    "zero3-stateful-loader-with-workers": (
        {"loader": "stateful-workers", "trainer": {"use_distributed_sampler": False}},
        [end_of(7)],
    ),
    "zero2-max-steps": (
        {"strategy": "gemini_stage_2", "trainer": {"max_epochs": -1, "max_steps": 8, "accumulate_grad_batches": 2}},
        [end_of(5)],
    ),
    "zero3-every-third-step": ({"strategy": {"stage": 3, "checkpoint_every": 3}, "scheduler": "cosine"}, [end_of(8)]),
    "zero3-offload-by-config": (
        {
            "strategy": {
                "config": {
                    "zero_optimization": {
                        "stage": 3,
                        "offload_optimizer": {"device": "cpu"},
                        "offload_param": {"device": "cpu"},
                    },
                    "zero_force_ds_cpu_optimizer": False,
                    "zero_allow_untested_optimizer": True,
                }
            },
        },
        [end_of(7)],
    ),
    "zero1-one-replica": ({"strategy": {"stage": 1, "replicas": 1}, **TWO_MACHINES}, [end_of(7)]),
    "zero3-first-steps": (
        {**TWO_MACHINES},
        [{"hook": "on_train_batch_start", "step": 0}, end_of(1), {"hook": "on_before_optimizer_step", "step": 2}],
    ),
}


def cadence(options: dict[str, Any]) -> int:
    """Steps from one version to the next; every other step has none while the network's idle time is profiled."""
    given = options.get("strategy")
    settings = given if isinstance(given, dict) else {}
    profiled = options.get("machines", 1) > 1 and settings.get("replicas") != 1
    return max(int(settings.get("checkpoint_every", 1)), 2 if profiled else 1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_interrupted_training_ends_the_same(make_job: MakeJob, undisturbed: Undisturbed, name: str) -> None:
    options, places = SCENARIOS[name]
    job = make_job(**options)
    for place in places:
        assert not job.run(stop=place).ended
    outcome = job.run()
    assert outcome.ended, outcome.output
    assert outcome.start["tier"] == "local_memory", outcome.output
    every = cadence(options)
    steps = max(record["step"] for attempt in job.attempts[:-1] for record in attempt.of("train"))
    assert steps - 2 * every <= outcome.start["step"] <= steps
    assert_same_training(undisturbed(**options), job.attempts)
    assert job.agents() == [], "the job is over: its memory must be free"
