"""Makes loaders resumable, or says why not."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.data import DataLoader, IterableDataset

from lightning_gemini.callbacks.data_position.position import EpochState
from lightning_gemini.callbacks.data_position.position_tracker import PositionTracker
from lightning_gemini.callbacks.data_position.resumable_loader import (
    Resumable,
    StatefulProxy,
    map_style_class,
    stateful_class,
    swap_class,
)

__all__ = ["exactness_warning", "make_resumable"]


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

    A loader with state of its own is asked for it before every fetch.

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


def _has_state(loader: object) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict", "__iter__"))
