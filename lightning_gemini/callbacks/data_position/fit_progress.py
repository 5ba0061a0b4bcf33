"""What Lightning's fit loop has done with the batches that it fetched."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops import fetchers

from lightning_gemini.callbacks.data_position.position import EpochState

__all__ = ["batches_in_flight", "epoch_state"]


def batches_in_flight(trainer: Any) -> int:
    """Counts the batches that a trainer's fit loop has fetched but not processed.

    It holds from ``on_train_batch_start`` of one batch to the next fetch. Fetches that Lightning makes in advance to
    recognise the last batch of a loader without length are counted too.
    """
    fetcher = trainer.fit_loop._data_fetcher
    if isinstance(fetcher, fetchers._DataLoaderIterDataFetcher):
        return 0  # training_step(dataloader_iter) fetches for itself
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    return max(0, int(current.ready - current.processed)) + len(getattr(fetcher, "batches", ()))


def epoch_state(trainer: Any) -> EpochState:
    """What a trainer's fit loop does next with its loaders when no batch is in flight.

    A run that resumes behind ``on_train_batch_end`` of the last batch trains on what comes from the iterator that it
    makes at its start; one that resumes later in the end of the epoch looks for a batch, or makes another iterator.
    """
    loop = trainer.fit_loop.epoch_loop
    current = loop.batch_progress.current
    if not current.processed or not loop._num_ready_batches_reached():
        return EpochState.RUNNING
    return EpochState.OVER if current.completed < current.processed else EpochState.ENDING
