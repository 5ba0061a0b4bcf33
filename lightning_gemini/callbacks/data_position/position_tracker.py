"""Follows the iterators of one loader, and brings a new one to the same place.

The order of an epoch's batches is drawn by the index sampler from random state at two moments: in ``iter(sampler)``
and, by torch's own samplers, at the first index. The tracker records the random state at both and before every fetch,
and on resume puts it back at each of these moments, whatever the process has drawn in between.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_gemini.callbacks.data_position.position import EpochState, Origin, Position
from lightning_gemini.callbacks.data_position.random_state import RandomSource, RandomState

__all__ = ["Cursor", "PositionTracker", "ReadInner", "TrackedSampler", "moments"]

ReadInner = Callable[[], Any]
FindSources = Callable[[], tuple[RandomSource, ...]]
moments = itertools.count()
_REMEMBERED_FETCHES = 4


@dataclass(slots=True, eq=False)
class Cursor:
    """One iterator's progress: shared by it and the tracker, so that the tracker keeps no iterator alive.

    Attributes:
        length: batches in the epoch, if known.
        last: the position before the iterator reported its end, once it has.
    """

    origin: Origin
    length: int | None
    delivered: int = 0
    last: Position | None = None


@dataclass(slots=True, eq=False)
class _Resumption:
    """From ``iter`` at a loaded position to the end of the first fetch; `fetch` is the random state for that fetch."""

    position: Position
    cursor: Cursor
    fetch: RandomState
    skipped: bool = False


@dataclass(eq=False)
class PositionTracker:
    """Follows the iterator of a loader that began or fetched last. Used by the training thread alone.

    Attributes:
        in_flight: tells how many of the last fetches a state is to leave out.
        epoch_state: tells the state of the epoch when nothing is in flight. By default it is over once all batches of a
            known length are delivered.
        sources: what the loader draws from beside the process's generators, as of the last ``iter``.
        creating: whether the loader's own iterator is being made.
        loaded_at: when a position was loaded, in counts of `moments`.
    """

    in_flight: Callable[[], int]
    epoch_state: Callable[[], EpochState] | None = None
    sources: tuple[RandomSource, ...] = ()
    creating: bool = False
    loaded_at: int = 0
    _recent: deque[Position] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_FETCHES))
    _cursor: Cursor | None = None
    _loaded: Position | None = None
    _resumption: _Resumption | None = None
    _later: deque[RandomState] = field(default_factory=deque)
    _workers: bool = False
    _rewind: RandomState | None = None
    _fetching: bool = False
    _created_in_fetch: bool = False
    _index_iterations: int = 0

    @property
    def resuming(self) -> Position | None:
        """The position in mid-epoch to which the iterator in the making or the first fetch has to be brought."""
        resumption = self._resumption
        return None if resumption is None or self.next_epoch is not None else resumption.position

    @property
    def next_epoch(self) -> Position | None:
        """The position behind an epoch from where the next one is to begin, at the first fetch."""
        resumption = self._resumption
        between = resumption is not None and resumption.position.epoch is not EpochState.RUNNING
        return resumption.position if resumption is not None and between else None

    @property
    def ending(self) -> bool:
        """Whether the consumer first looks for the end of the epoch that is over."""
        return self.next_epoch is not None and self.next_epoch.epoch is EpochState.ENDING

    def forget(self) -> None:
        """Forgets all positions; whatever the loader does next is taken as its beginning."""
        self._loaded = self._resumption = self._cursor = None
        self._recent.clear()
        self._later.clear()

    def load(self, position: Position) -> None:
        """Makes the next ``iter`` resume at a position."""
        self.forget()
        self._loaded, self.loaded_at = position, next(moments)

    def position(self, find_sources: FindSources, length: int | None, read_inner: ReadInner) -> Position:
        """The position before the fetches in flight."""
        if self._loaded is not None or self._resumption is not None:
            return self._loaded or self._resumption.position  # type: ignore[union-attr]
        if (steps := self.in_flight()) > 0 and self._recent:
            return self._before_last(steps, find_sources, length)
        now = RandomState.capture(find_sources())
        if self._cursor is None:
            return Position(Origin(workers=False), 0, now, EpochState.OVER, inner=read_inner())
        return self._here(self._cursor, now, length, read_inner)

    def _before_last(self, fetches: int, find_sources: FindSources, length: int | None) -> Position:
        position, *after = list(self._recent)[-fetches:]
        if length is not None and not after:
            return position
        later = [repeated.fetch for repeated in after]
        # Of a loader without length Lightning fetches a batch ahead, so a single batch in flight is not in training
        # yet, unless it is the last, behind which Lightning has found the end. Either way training had drawn since.
        if length is None and fetches == 1 and self._cursor is not None:
            last = self._cursor.last
            later.append(RandomState.capture(find_sources()) if last is None else last.fetch)
        return replace(position, later=tuple(later))

    def _here(self, cursor: Cursor, now: RandomState, length: int | None, read_inner: ReadInner) -> Position:
        epoch = self.epoch_state() if self.epoch_state is not None else _guess_epoch_state(cursor, length)
        if cursor.last is None:
            return Position(cursor.origin, cursor.delivered, now, epoch, inner=read_inner())
        stays = epoch is EpochState.RUNNING
        return Position(cursor.origin, cursor.delivered, now, epoch, stays, inner=cursor.last.inner)

    def begin(self, sources: tuple[RandomSource, ...], origin: Origin, length: int | None) -> Cursor:
        """Begins an epoch or goes on with the loaded one. Called before the loader's own iterator is made."""
        self.sources, self._workers, self._rewind = sources, origin.workers, None
        loaded, resumption = self._loaded, self._resumption
        if loaded is None and resumption is not None:  # given up without a fetch, for the next epoch
            loaded = replace(resumption.position, epoch=EpochState.OVER)
        self._loaded = self._resumption = None
        self._later.clear()
        self._cursor = Cursor(origin, length)
        if loaded is not None:
            if loaded.epoch is EpochState.RUNNING:
                last = loaded if loaded.exhausted else None
                self._cursor = Cursor(loaded.origin, length, loaded.delivered, last)
            self._resumption = _Resumption(loaded, self._cursor, loaded.fetch)
            _awaiting_first_fetch.add(self)
        return self._cursor

    def begin_late(self) -> None:
        """Begins the epoch behind a loaded position at the first fetch: by then Lightning has set the epoch."""
        if (position := self.next_epoch) is not None:
            position.fetch.restore_sources([source for source in self.sources if not source.set_by_consumer])
            if position.origin.persistent and self._workers:
                self._rewind = RandomState.capture(self.sources)
        _awaiting_first_fetch.discard(self)
        self._resumption = None

    @contextmanager
    def creation(self) -> Iterator[None]:
        """While a map-style loader's own iterator is made, which a subclass may put off to the first fetch."""
        assert self._cursor is not None
        origin, resuming = self._cursor.origin, self.resuming
        self.creating, self._created_in_fetch, self._index_iterations = True, self._fetching, 0
        if resuming is None:
            origin.created = RandomState.capture(self.sources)
        elif origin.created is not None:
            origin.created.restore(self.sources)
        try:
            yield
        finally:
            self.creating = False
        if resuming is not None and self._fetching and resuming.delivered:
            self._restore_fetch()

    def track_indices(self, sampler: Iterable[Any]) -> Iterator[Any]:
        """``iter(sampler)`` that records where its order comes from or, on resume, puts that back and skips."""
        assert self._cursor is not None
        origin = self._cursor.origin
        self._index_iterations += 1
        # With workers, torch calls iter() once in vain, draws the workers' seed, and calls it again: the first call has
        # to take its natural way for the seed to be the same.
        in_vain = self._workers and self._index_iterations == 1
        if self.resuming is None:
            if self._rewind is not None and not in_vain:  # workers that live on would not have drawn a seed
                self._rewind.restore(self.sources)
                self._rewind = None
            origin.iterated = RandomState.capture(self.sources)
            return self._record(iter(sampler), origin)
        if origin.iterated is not None and not in_vain:
            origin.iterated.restore(self.sources)
        return self._skip(iter(sampler), self.resuming)

    def _record(self, indices: Iterator[Any], origin: Origin) -> Iterator[Any]:
        origin.drawn = RandomState.capture(self.sources)
        yield from indices

    def _skip(self, indices: Iterator[Any], position: Position) -> Iterator[Any]:
        origin, ahead = position.origin, list[Any]()
        if origin.drawn is not None:
            origin.drawn.restore(self.sources)
        elif not self._fetching:  # saved before the first fetch, which would have drawn
            position.fetch.restore(self.sources)
        origin.drawn = RandomState.capture(self.sources)
        deque(itertools.islice(indices, None if position.exhausted else position.delivered), maxlen=0)
        if origin.workers:  # the next index had been drawn before the fetch began, too
            ahead.extend(itertools.islice(indices, 1))
        if self._fetching and (position.delivered or not self._created_in_fetch):
            self._restore_fetch()
        if self._resumption is not None:
            self._resumption.skipped = True
        yield from ahead
        yield from indices

    def begin_fetch(self, cursor: Cursor, read_inner: ReadInner) -> Position:
        """Returns the position before a fetch; on the first after a resume, puts the random state back."""
        self._cursor, self._fetching, self._created_in_fetch = cursor, True, False
        resumption = self._resumption
        if resumption is not None and resumption.cursor is cursor:
            self._take_turn(resumption)
            self._restore_fetch()
            self._later.extend(resumption.position.later)
            fetch, inner = resumption.fetch, resumption.position.inner
        else:
            if self._later:
                self._later.popleft().restore(self.sources)
            fetch, inner = RandomState.capture(self.sources), read_inner()
        if inner is not None and cursor.origin.drawn is None:
            cursor.origin.drawn = fetch
        return Position(cursor.origin, cursor.delivered, fetch, exhausted=cursor.last is not None, inner=inner)

    def end_fetch(self, position: Position | None) -> None:
        """Ends a fetch; `position` is where it began, None if it is not one to repeat."""
        resumption, self._resumption, self._fetching = self._resumption, None, False
        if position is None:
            return
        self._recent.append(position)
        if resumption is not None and position.inner is None and not resumption.skipped and position.delivered:
            warnings.warn(
                "the train loader took its batches from an iterator of an earlier time, so the"
                f" {position.delivered} batches of this epoch that had been seen were not skipped."
                " Let the loader make an iterator in every __iter__.",
                stacklevel=3,
            )

    def _take_turn(self, resumption: _Resumption) -> None:
        # Loaders of a trainer that were saved at the same moment go on one after the other: only the first fetch
        # starts from the process state of that moment, the others from what the ones before them have left.
        if self not in _awaiting_first_fetch:
            resumption.fetch = replace(RandomState.capture(), sources=resumption.fetch.sources)
        for other in list(_awaiting_first_fetch):
            theirs = other._resumption
            if other is not self and theirs is not None and theirs.fetch.same_process_state(resumption.fetch):
                _awaiting_first_fetch.discard(other)
        _awaiting_first_fetch.discard(self)

    def _restore_fetch(self) -> None:
        if self._resumption is not None:
            self._resumption.fetch.restore(self.sources)


_awaiting_first_fetch: weakref.WeakSet[PositionTracker] = weakref.WeakSet()


def _guess_epoch_state(cursor: Cursor, length: int | None) -> EpochState:
    at_end = cursor.last is not None
    # Who has read beyond a last batch that it knew, and has not begun another epoch, has other loaders to read on from.
    over = at_end if length is None else cursor.delivered >= length and not at_end
    return EpochState.OVER if over else EpochState.RUNNING


class TrackedSampler:
    """An index sampler whose iteration a tracker follows."""

    def __init__(self, sampler: Any, tracker: PositionTracker) -> None:
        self._sampler, self._tracker = sampler, tracker

    def __iter__(self) -> Iterator[Any]:
        return self._tracker.track_indices(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
