"""Exact resumption of data loaders in mid-epoch.

Lightning saves the state of loaders that have ``state_dict`` and ``load_state_dict``, and restarts all others at their
first batch. `make_resumable` gives ordinary map-style loaders these two methods, and corrects those of loaders that
have them already for the batch that Lightning has fetched but not trained on yet when the state is taken.
"""

from lightning_gemini.callbacks.data_position.fit_progress import batches_in_flight, epoch_state
from lightning_gemini.callbacks.data_position.position import EpochState
from lightning_gemini.callbacks.data_position.resumable import exactness_warning, make_resumable
from lightning_gemini.callbacks.data_position.saved_positions import put_back_positions, set_aside_positions

__all__ = [
    "EpochState",
    "batches_in_flight",
    "epoch_state",
    "exactness_warning",
    "make_resumable",
    "put_back_positions",
    "set_aside_positions",
]
