"""Training over p2p that compares every committed version with its replica; ``P2P_BREAK_AT``: breaks a connection."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint
from tests.strategies import training
from tests.strategies.replicas import HolderMemory, content_of

MEETING_S = 30.0


class Watch(Callback):
    """Starts when the workers have met; writes down what travelled how."""

    def __init__(self, recorder: training.Recorder) -> None:
        self.write = recorder.write
        self.breaks_at = int(os.environ.get("P2P_BREAK_AT", "-1"))
        self.checked: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        exchange = trainer.strategy.job_state.exchange  # type: ignore[attr-defined]
        deadline = time.monotonic() + MEETING_S
        while self.checked is None and not exchange.working and time.monotonic() < deadline:
            time.sleep(0.01)
        if trainer.global_rank == 1 and training.steps(trainer) == self.breaks_at:
            exchange._receiving[0].close()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = trainer.strategy.job_state  # type: ignore[attr-defined]
        publisher = _publisher(trainer)
        version = publisher.committed
        if version is None or version == self.checked:
            return
        self.checked = version
        own, owner = content_of(publisher.committed_buffer()), trainer.global_rank
        (holder,) = state.memory.placement.holders(owner)[1:]
        equal = HolderMemory(os.environ["LIGHTNING_GEMINI_JOB"], holder).replica(owner, version) == own
        exchange = state.exchange
        about = {"working": exchange.working, "held": state.slab.pace.held, "peak_bytes": exchange.peak_buffer_bytes}
        self.write("replica", version=version.version, equal=equal, bytes=len(own), **about)


def _publisher(trainer: pl.Trainer) -> Any:
    (checkpoint,) = [callback for callback in trainer.callbacks if isinstance(callback, GeminiCheckpoint)]  # type: ignore[attr-defined]
    return checkpoint._publisher


_given = training.callbacks


def callbacks(options: training.Options) -> list[Callback]:
    return [*_given(options), Watch(training.Recorder(Path(options.out)))]


if __name__ == "__main__":
    training.callbacks = callbacks
    training.main()
