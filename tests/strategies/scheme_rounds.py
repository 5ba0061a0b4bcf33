"""Training that changes the scheme every few steps, and compares every committed version with its replica."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint
from tests.strategies import training
from tests.strategies.replicas import HolderMemory, content_of

SCHEMES = ("interleaved", "unpipelined", "naive", "eager", "blocking", "none")
STEPS = 6


class SchemeRounds(Callback):
    """Once there is a plan: every scheme for some steps, then the end."""

    def __init__(self, recorder: training.Recorder) -> None:
        self.write = recorder.write
        self.first: int | None = None
        self.checked: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        traffic = trainer.strategy.job_state.traffic  # type: ignore[attr-defined]
        if traffic.plan is None:
            return
        if self.first is None:
            self.first = training.steps(trainer)
        done, rest = divmod(training.steps(trainer) - self.first, STEPS)
        if done < len(SCHEMES) and rest == 0:
            traffic.set_scheme(SCHEMES[done])
        trainer.should_stop = done >= len(SCHEMES)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = trainer.strategy.job_state  # type: ignore[attr-defined]
        (checkpoint,) = [callback for callback in trainer.callbacks if isinstance(callback, GeminiCheckpoint)]  # type: ignore[attr-defined]
        publisher = checkpoint._publisher
        assert publisher is not None
        version = publisher.committed
        if version is None or version == self.checked:
            return
        self.checked = version
        own = publisher.committed_buffer()
        assert own is not None
        expected, owner = content_of(own), trainer.global_rank
        holders = state.memory.placement.holders(owner)[1:]
        job = os.environ["LIGHTNING_GEMINI_JOB"]
        equal = all(HolderMemory(job, holder).replica(owner, version) == expected for holder in holders)
        planned = state.traffic.plan is not None
        scheme = state.traffic.scheme.value
        self.write("replica", version=version.version, scheme=scheme, planned=planned, equal=equal, of=len(holders))


def callbacks(options: training.Options) -> list[Callback]:
    recorder = training.Recorder(Path(options.out))
    return [recorder, SchemeRounds(recorder)]


if __name__ == "__main__":
    training.callbacks = callbacks
    training.main()
