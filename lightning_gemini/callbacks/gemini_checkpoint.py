"""The callback that says when a version is taken, and puts the loops and random numbers back where they were."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Checkpoint

from lightning_gemini.callbacks.lightning_state import lightning_state
from lightning_gemini.callbacks.publisher import VersionPublisher
from lightning_gemini.callbacks.training_random import capture_random, restore_random
from lightning_gemini.core.scheme import Scheme
from lightning_gemini.errors import ConfigurationError
from lightning_gemini.strategies.zero_state import require_supported

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_gemini.callbacks.job_state import JobState
    from lightning_gemini.strategies.gemini import GeminiStrategy

log = logging.getLogger(__name__)


class GeminiCheckpoint(Checkpoint):
    """Takes a version after every optimizer step (or every ``checkpoint_every``).

    A version of step k is taken when the batch after it starts: by then every hook, validation and epoch end that
    belongs to step k is over, so that a resumed run repeats nothing and misses nothing. The strategy adds this callback
    by itself.
    """

    def __init__(self) -> None:
        self._publisher: VersionPublisher | None = None
        self._resume: dict[str, Any] | None = None
        self._settled_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse other strategies, and what cannot be checkpointed from memory."""
        if not hasattr(trainer.strategy, "job_state"):
            raise ConfigurationError(
                f"GeminiCheckpoint needs Trainer(strategy='gemini'), found {type(trainer.strategy).__name__}"
            )
        strategy = _strategy(trainer)
        if stage == "fit" and strategy.checkpoint_config.enabled:
            require_supported(strategy.config or {})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room in memory, before the first step."""
        state = _strategy(trainer).job_state
        if state is None:
            return
        found = state.found
        self._resume = (
            {"random": found.volatile["random"], "loops": found.volatile["lightning"]["loops"]} if found else None
        )
        self._settled_step = state.zero.step
        self._publisher = state.open(lightning_state(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """All that belongs to the last optimizer step is over: commit its predecessor and publish it."""
        state, publisher = _strategy(trainer).job_state, self._publisher
        if state is None or publisher is None:
            return
        if self._resume is not None:
            resume, self._resume = self._resume, None
            _restore_progress(trainer, resume["loops"])
            restore_random(resume["random"])
        step = state.zero.step
        if step == self._settled_step and publisher.newest is not None:
            return
        if not state.zero.at_boundary:
            return
        self._settled_step = step
        state.slab.buffers[0].report_progress(step)
        traffic = state.traffic
        waited_s = publisher.waited_s if publisher.settle() else None
        self._persist_if_due(state)
        traffic.begin_iteration(step, publisher.agreed, waited_s)
        known = publisher.newest is not None and publisher.newest.version == step
        due = traffic.is_due(step) and not known and publisher.ready(step)
        if due:
            self._publish(trainer, state, step)
        traffic.iteration_begun(step, published=due, settled=publisher.settled)
        publisher.patient = traffic.is_due(step + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The job's result is the user's now; memory may go."""
        state = _strategy(trainer).job_state
        if state is not None:
            if self._publisher is not None:
                state.slab.buffers[0].report_progress(state.zero.step)
            state.finished = True

    def _publish(self, trainer: pl.Trainer, state: JobState, step: int) -> None:
        assert self._publisher is not None
        began = time.perf_counter()
        try:
            extra = {
                "random": capture_random(),
                "profile": state.traffic.packed_profile,
                "persisted": state.persistent.mark if state.persistent is not None else None,
            }
            draft = state.draft(lightning_state(trainer), extra)
        except Exception as error:  # a user's hook, an object that cannot be pickled: training must go on
            log.warning("version %d cannot be taken: %s", step, error, exc_info=True)
            draft = None
        self._publisher.costs = {"scheme": state.traffic.scheme.value}
        self._publisher.publish(step, draft, began)
        if state.traffic.scheme is Scheme.BLOCKING:
            self._publisher.wait_for_holders()

    def _persist_if_due(self, state: JobState) -> None:
        assert self._publisher is not None
        tier, publisher = state.persistent, self._publisher
        if tier is None:
            return
        if publisher.agreed.persist:
            tier.write(publisher.committed_buffer(), publisher.committed)
        if tier.wanted:
            publisher.votes.persist = True


def _strategy(trainer: pl.Trainer) -> GeminiStrategy:
    return trainer.strategy  # type: ignore[return-value]


def _restore_progress(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    """Put every counter back to what it was at this very moment of the batch.

    Lightning's own restart repairs counters for checkpoints taken elsewhere (``on_train_batch_end``), and leaves some
    of them, and schedulers of the resumed epoch, one off.
    """
    fit_loop = trainer.fit_loop
    fit_loop.load_state_dict(loops["fit_loop"])
    fit_loop._combined_loader_states_to_load = []  # the loaders are there already
    fit_loop.restarting = False
