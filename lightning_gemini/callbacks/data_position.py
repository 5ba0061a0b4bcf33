"""Exact resumption of data loaders in mid-epoch.

Lightning saves the state of loaders that have ``state_dict`` and ``load_state_dict``, and restarts all others at their
first batch. `make_resumable` gives ordinary map-style loaders these two methods, and corrects those of loaders that
have them already for the batch that Lightning has fetched but not trained on yet when the state is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_gemini.callbacks.position_tracker import EpochState, PositionTracker
from lightning_gemini.callbacks.resumable_loader import (
    Resumable,
    StatefulProxy,
    map_style_class,
    stateful_class,
    swap_class,
)

__all__ = ["EpochState", "batches_in_flight", "epoch_state", "exactness_warning", "make_resumable"]


def make_resumable(
    loader: object, in_flight: Callable[[], int], epoch_state: Callable[[], EpochState] | None = None
) -> object:
    """Makes a loader's position part of checkpoints, exact to the batch and to the random number.

    The loader stays the same object; its class becomes a subclass of what it was. (A loader whose class cannot be
    swapped comes back inside a proxy.) A loader that cannot be resumed comes back as it is, and `exactness_warning`
    says why.

    ``state_dict()`` describes the position before the last ``in_flight()`` fetches; after ``load_state_dict`` and
    ``iter`` the next batch is the first of those, its random numbers are the same, and what was delivered before is
    not loaded again. A state taken when the epoch was over makes the next ``iter`` begin the next epoch. Without
    `epoch_state`, an epoch of known length is over when all its batches have been delivered, unless the iterator has
    reported its end, too: then it stays at its end, where the first fetch stops at once.

    What cannot be told from outside, and is not exact: random numbers which a data set draws *inside worker processes*
    (workers start anew from the epoch's base seed, so augmentations after a resume in mid-epoch differ; the samples and
    their order do not); and samplers which draw from a global generator again and again during the epoch (all of
    torch's draw when the epoch begins, or from a generator of their own).

    Args:
        loader: a `DataLoader`, or any other iterable.
        in_flight: how many batches have been fetched but not processed, e.g. `batches_in_flight` of the trainer.
        epoch_state: whether the consumer is done with the epoch, e.g. `epoch_state` of the trainer. Lightning's
            checkpoints at the end of an epoch need it; it is asked only when nothing is in flight.
    """
    if isinstance(loader, Resumable | StatefulProxy):
        loader._gemini_tracker.in_flight, loader._gemini_tracker.epoch_state = in_flight, epoch_state
        return loader
    tracker = PositionTracker(in_flight, epoch_state)
    if _has_state(loader):
        return loader if swap_class(loader, stateful_class, tracker) else StatefulProxy(loader, tracker)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        swap_class(loader, map_style_class, tracker)
    return loader


def exactness_warning(loader: object) -> str | None:
    """Says why a loader cannot be resumed exactly and what to do about it; None for one that can.

    It sees only what the loader is, not what its data set and samplers do (see `make_resumable`).
    """
    name = type(loader).__name__
    if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
        return (
            f"{name} with in_order=False delivers batches as its workers finish them, so a run that resumes in"
            " mid-epoch may see some batches twice and miss others. Use in_order=True."
        )
    if _has_state(loader):
        return None
    if not isinstance(loader, DataLoader):
        return (
            f"the train loader of type {name} has no state_dict and load_state_dict, so a run that resumes in mid-epoch"
            " starts it at its first batch. Use a DataLoader with a map-style data set, or give it these two methods."
        )
    if isinstance(loader.dataset, IterableDataset):
        return (
            f"{name} over the iterable-style data set {type(loader.dataset).__name__} cannot tell its position, so a"
            " run that resumes in mid-epoch starts it at its first batch. Use torchdata's StatefulDataLoader and give"
            " the data set state_dict and load_state_dict, or use a map-style data set."
        )
    return None


def batches_in_flight(trainer: Any) -> int:
    """Counts the batches that a trainer's fit loop has fetched but not processed.

    It holds from ``on_train_batch_start`` of one batch to the next fetch. Fetches that Lightning makes in advance to
    recognise the last batch of a loader without length are counted too.
    """
    from lightning.pytorch.loops import fetchers

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


def _has_state(loader: object) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict", "__iter__"))
