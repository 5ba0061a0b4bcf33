"""The classes that loaders get when they are made resumable: thin, everything else is the loader's own.

Python swaps the class of an object only for one whose first base is the class that it has, so each is made to measure.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader

from lightning_gemini.callbacks.data_position.counted_batches import CountedBatches
from lightning_gemini.callbacks.data_position.position import Origin, Position
from lightning_gemini.callbacks.data_position.position_tracker import PositionTracker, ReadInner, TrackedSampler
from lightning_gemini.callbacks.data_position.random_state import RandomState, find_random_sources
from lightning_gemini.errors import RestoreError

__all__ = ["Resumable", "StatefulProxy", "map_style_class", "stateful_class", "swap_class"]

_KEY = "lightning_gemini"
_INNER = "inner"


class Resumable:
    """What a resumable loader has of its own."""

    _gemini_ordinary_class: type
    _gemini_position: PositionTracker | None = None

    @property
    def _gemini_tracker(self) -> PositionTracker:
        """The tracker that `make_resumable` gave the loader."""
        if self._gemini_position is None:  # Lightning made this loader anew, by calling the class of a resumable one
            self._gemini_position = PositionTracker(lambda: 0)
        return self._gemini_position

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be found by name, so what is copied or sent to another process is an ordinary loader again.
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        state = {name: value for name, value in vars(self).items() if name != "_gemini_position"}
        return object.__new__, (self._gemini_ordinary_class,), state


@functools.cache
def map_style_class(ordinary: Any) -> type:
    """A subclass of a map-style DataLoader class which on resume skips index batches, so nothing is loaded in vain."""

    class ResumableDataLoader(ordinary, Resumable):  # type: ignore[misc]
        __doc__ = ordinary.__doc__
        _gemini_ordinary_class = ordinary

        def __iter__(self) -> Any:
            cursor = self._gemini_tracker.begin(find_random_sources(self), _new_origin(self), _length(self))
            return CountedBatches(super().__iter__, self._gemini_tracker, cursor, _nothing)

        def _get_iterator(self) -> Any:
            with self._gemini_tracker.creation():
                return super()._get_iterator()

        @property
        def _index_sampler(self) -> Any:
            sampler = super()._index_sampler
            return TrackedSampler(sampler, self._gemini_tracker) if self._gemini_tracker.creating else sampler

        def state_dict(self) -> dict[str, Any]:
            """The position before the batches in flight, in plain values."""
            length = _length(self)
            position = self._gemini_tracker.position(lambda: find_random_sources(self), length, _nothing)
            return {_KEY: {"loader": "map-style", "batches": length, **position.to_plain()}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Makes the next ``iter`` go on at a position; raises RestoreError for the state of another kind."""
            position = _map_style_position(ordinary.__name__, _length(self), state_dict)
            self._iterator = None  # persistent workers would go on with the order that they have
            self._gemini_tracker.load(position)

    return _named_like(ordinary, ResumableDataLoader)


@functools.cache
def stateful_class(ordinary: Any) -> type:
    """A subclass of a class of loaders with state of their own, which is read before every fetch."""

    class ResumableStateful(ordinary, Resumable):  # type: ignore[misc]
        __doc__ = ordinary.__doc__
        _gemini_ordinary_class = ordinary

        def __iter__(self) -> Any:
            return _iterate_stateful(self, self._gemini_tracker, super().__iter__, super().state_dict)

        def state_dict(self) -> dict[str, Any]:
            """The loader's own state before the batches in flight, and the random state beside it."""
            return _stateful_state(self, self._gemini_tracker, super().state_dict)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Loads the loader's own state now; the random state is put back when iteration begins."""
            super().load_state_dict(_load_stateful(self._gemini_tracker, state_dict))

    return _named_like(ordinary, ResumableStateful)


class StatefulProxy:
    """Stands for a loader with state whose class cannot be swapped, e.g. one with slots."""

    def __init__(self, loader: Any, tracker: PositionTracker) -> None:
        self.__dict__.update(_loader=loader, _gemini_tracker=tracker)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy in the making
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Any:
        return _iterate_stateful(self._loader, self._gemini_tracker, self._loader.__iter__, self._loader.state_dict)

    def state_dict(self) -> dict[str, Any]:
        """The loader's own state before the batches in flight, and the random state beside it."""
        return _stateful_state(self._loader, self._gemini_tracker, self._loader.state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the loader's own state now; the random state is put back when iteration begins."""
        self._loader.load_state_dict(_load_stateful(self._gemini_tracker, state_dict))


def swap_class(loader: Any, make_class: Callable[[Any], type], tracker: PositionTracker) -> bool:
    """Gives a loader the class made from its own; False if Python does not allow that."""
    if not hasattr(loader, "__dict__"):
        return False
    try:
        loader.__class__ = make_class(type(loader))
    except TypeError:
        return False
    loader._gemini_position = tracker
    if make_class is map_style_class and loader._iterator is not None:  # persistent workers that are in use already
        loader._iterator._index_sampler = TrackedSampler(loader._iterator._index_sampler, tracker)
    return True


def _named_like(ordinary: type, made: type) -> type:
    made.__name__ = made.__qualname__ = f"Resumable{ordinary.__name__}"
    return made


def _map_style_position(name: str, length: int | None, state: dict[str, Any]) -> Position:
    plain = state.get(_KEY, {})
    if plain.get("loader") != "map-style":
        raise RestoreError(
            f"expected the position of a map-style {name}, found a state with the keys {sorted(state)}, of another kind"
            " of loader; resume with the kind that the run began with"
        )
    if plain["batches"] != length:
        warnings.warn(
            f"the train loader had {plain['batches']} batches per epoch when the checkpoint was taken and has"
            f" {length} now: it goes on after {plain['delivered']} batches, but not with the same data."
            " Use the same data set, batch size and number of processes to resume exactly.",
            stacklevel=3,
        )
    return Position.from_plain(plain)


def _new_origin(loader: Any) -> Origin:
    workers = getattr(loader, "num_workers", 0) > 0
    return Origin(workers, workers and getattr(loader, "persistent_workers", False))


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _nothing() -> None:
    """The inner state of a loader that has none."""


def _iterate_stateful(
    loader: Any, tracker: PositionTracker, iterate: Callable[[], Any], read: ReadInner
) -> CountedBatches:
    sources, origin = find_random_sources(loader), _new_origin(loader)
    cursor, read = tracker.begin(sources, origin, _length(loader)), _copying(read)
    left = tracker.next_epoch

    def make() -> Any:
        if tracker.resuming is not None:
            with _order_drawn_again(loader, cursor.origin, tracker):
                return iterate()
        if left is not None and left.delivered:  # its own state is still in the epoch that is over
            here = RandomState.capture(sources)
            next(iterate(), None)  # lazy ones take in what they loaded only now
            here.restore(sources)
        if getattr(getattr(loader, "sampler", None), "next_yielded", 0) is None:
            loader.sampler.yielded = (
                0  # torchdata's distributed sampler tells the last epoch's count until its first index
            )
        cursor.origin.iterated = RandomState.capture(sources)
        if not origin.persistent or loader._iterator is None:
            cursor.origin.created = cursor.origin.iterated
        return iterate()

    return CountedBatches(make, tracker, cursor, read)


@contextmanager
def _order_drawn_again(loader: Any, origin: Origin, tracker: PositionTracker) -> Iterator[None]:
    # torchdata draws an order again, and skips to its position, while the iterator is made, but after it has drawn the
    # workers' seed. Where the order was first drawn without that (at the first fetch in a single process, or by
    # persistent workers in a later epoch), the seed has to come from elsewhere.
    state = origin.iterated if origin.workers else origin.drawn or origin.iterated
    elsewhere = isinstance(loader, DataLoader) and (
        origin.created is None if origin.workers else origin.drawn is not None
    )
    if state is not None:
        state.restore(tracker.sources)
    generator = getattr(loader, "generator", None)
    if elsewhere:
        loader.generator = torch.Generator()
    try:
        with _drawn_alike(_sampler_of(loader), origin, tracker):
            yield
    finally:
        if elsewhere:
            loader.generator = generator


def _sampler_of(loader: Any) -> Any:
    # A loader that was given a batch sampler of its own has a sampler too, which it does not use.
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "sampler", getattr(loader, "sampler", None))


@contextmanager
def _drawn_alike(sampler: Any, origin: Origin, tracker: PositionTracker) -> Iterator[None]:
    # Lightning's wrapper for distributed runs draws its whole order in `iter`, which torchdata calls more than once.
    ordinary = type(sampler)
    if origin.iterated is None or not isinstance(sampler, DistributedSamplerWrapper):
        yield
        return
    restore = functools.partial(origin.iterated.restore, tracker.sources)

    class Redrawn(ordinary):  # type: ignore[misc,valid-type]
        def __iter__(self) -> Any:
            restore()
            return super().__iter__()

    sampler.__class__ = Redrawn
    try:
        yield
    finally:
        sampler.__class__ = ordinary


def _stateful_state(loader: Any, tracker: PositionTracker, read: ReadInner) -> dict[str, Any]:
    position = tracker.position(lambda: find_random_sources(loader), _length(loader), _copying(read))
    plain = not isinstance(position.inner, dict)
    beside = {"loader": "stateful", "inner_is_value": plain, **position.to_plain()}
    return {_INNER: position.inner, _KEY: beside} if plain else {**position.inner, _KEY: beside}


def _load_stateful(tracker: PositionTracker, state: dict[str, Any]) -> Any:
    beside = state.get(_KEY, {})
    if beside.get("loader") != "stateful":  # saved without this package, or by another kind of loader
        tracker.forget()
        return state
    inner: Any = {name: value for name, value in state.items() if name != _KEY}
    inner = inner[_INNER] if beside["inner_is_value"] else inner
    tracker.load(Position.from_plain(beside, inner))
    return inner


def _copying(read: ReadInner) -> ReadInner:
    # What a loader hands out may be a live view of its state.
    return lambda: copy.deepcopy(read())
