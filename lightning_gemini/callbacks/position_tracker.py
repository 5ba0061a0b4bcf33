"""Where the iterators of one loader are, and how to bring a new one to the same place.

The order of an epoch's batches is drawn by the index sampler from random state at two moments: in ``iter(sampler)``
and, by torch's own samplers, at the first index. The tracker records the random state at both and before every fetch,
and on resume puts it back at each of these moments, whatever the process has drawn in between.
"""

from __future__ import annotations

import enum
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from lightning_gemini.callbacks.random_state import RandomSource, RandomState

__all__ = [
    "CountedBatches",
    "Cursor",
    "EpochState",
    "Origin",
    "Position",
    "PositionTracker",
    "ReadInner",
    "TrackedSampler",
]

ReadInner = Callable[[], Any]


class EpochState(enum.Enum):
    """What a consumer with nothing in flight does next with a loader.

    Attributes:
        RUNNING: it goes on with the epoch.
        OVER: it begins the next epoch, and may take the iterator for that which it makes on resume.
        ENDING: it begins the next epoch, but on resume it looks for the end of this one first.
    """

    RUNNING = "running"
    OVER = "over"
    ENDING = "ending"


_REMEMBERED_FETCHES = 4


@dataclass(slots=True)
class Origin:
    """The random state that an epoch's order came from. None: that moment has not come (yet).

    Attributes:
        workers: whether worker processes load the batches, so that indices are drawn ahead of the fetches.
        created: before the loader's own iterator was made, which draws the seed of the workers. None for persistent
            workers that began another epoch.
        iterated: before ``iter`` of the index sampler.
        drawn: before the first index was drawn.
    """

    workers: bool
    created: RandomState | None = None
    iterated: RandomState | None = None
    drawn: RandomState | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two batches.

    Attributes:
        origin: the epoch, filled in while its first batch is fetched.
        delivered: batches of the epoch before this place.
        fetch: random state when the next fetch (or the next epoch) begins.
        epoch: OVER also if none has begun.
        exhausted: the iterator has reported its end, which may have drawn, too.
        later: random states when the fetches after that began, for as many as training had not drawn between.
        inner: the loader's own state here, for a loader with state.
    """

    origin: Origin
    delivered: int
    fetch: RandomState
    epoch: EpochState = EpochState.RUNNING
    exhausted: bool = False
    later: tuple[RandomState, ...] = ()
    inner: Any = None

    def to_plain(self) -> dict[str, Any]:
        """The position, without `inner`, in plain values."""
        origin = self.origin
        states = {"created": origin.created, "iterated": origin.iterated, "drawn": origin.drawn, "fetch": self.fetch}
        plain = {name: state.to_plain() if state else None for name, state in states.items()}
        flags = {"workers": origin.workers, "epoch": self.epoch.value, "exhausted": self.exhausted}
        return {"delivered": self.delivered, **flags, **plain, "later": [state.to_plain() for state in self.later]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], inner: Any = None) -> Position:
        """The inverse of `to_plain`."""
        states = {
            name: plain[name] and RandomState.from_plain(plain[name]) for name in ("created", "iterated", "drawn")
        }
        fetch = RandomState.from_plain(plain["fetch"])
        origin = Origin(plain["workers"], **states)
        later = tuple(RandomState.from_plain(state) for state in plain["later"])
        epoch = EpochState(plain["epoch"])
        return cls(origin, plain["delivered"], fetch, epoch, plain["exhausted"], later, inner)


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
    """

    in_flight: Callable[[], int]
    epoch_state: Callable[[], EpochState] | None = None
    sources: tuple[RandomSource, ...] = ()
    creating: bool = False
    _recent: deque[Position] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_FETCHES))
    _cursor: Cursor | None = None
    _loaded: Position | None = None
    _resumption: _Resumption | None = None
    _later: deque[RandomState] = field(default_factory=deque)
    _workers: bool = False
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

    def forget(self) -> None:
        """Forgets all positions; whatever the loader does next is taken as its beginning."""
        self._loaded = self._resumption = self._cursor = None
        self._recent.clear()
        self._later.clear()

    def load(self, position: Position) -> None:
        """Makes the next ``iter`` resume at a position."""
        self.forget()
        self._loaded = position

    def position(self, sources: tuple[RandomSource, ...], length: int | None, read_inner: ReadInner) -> Position:
        """The position before the fetches in flight."""
        if self._loaded is not None or self._resumption is not None:
            return self._loaded or self._resumption.position  # type: ignore[union-attr]
        now = RandomState.capture(sources)
        if (steps := self.in_flight()) > 0 and self._recent:
            return self._before_last(steps, now, length)
        if self._cursor is None:
            return Position(Origin(workers=False), 0, now, EpochState.OVER, inner=read_inner())
        return self._here(self._cursor, now, length, read_inner)

    def _before_last(self, fetches: int, now: RandomState, length: int | None) -> Position:
        position, *after = list(self._recent)[-fetches:]
        later = [repeated.fetch for repeated in after]
        # Of a loader without length Lightning fetches a batch ahead, so a single batch in flight is not in training
        # yet, unless it is the last, behind which Lightning has found the end. Either way training had drawn since.
        if length is None and fetches == 1 and self._cursor is not None:
            later.append(now if self._cursor.last is None else self._cursor.last.fetch)
        return replace(position, later=tuple(later))

    def _here(self, cursor: Cursor, now: RandomState, length: int | None, read_inner: ReadInner) -> Position:
        epoch = self.epoch_state() if self.epoch_state is not None else _guess_epoch_state(cursor, length)
        if cursor.last is None:
            return Position(cursor.origin, cursor.delivered, now, epoch, inner=read_inner())
        stays = epoch is EpochState.RUNNING
        return Position(cursor.origin, cursor.delivered, now, epoch, stays, inner=cursor.last.inner)

    def begin(self, sources: tuple[RandomSource, ...], workers: bool, length: int | None) -> Cursor:
        """Begins an epoch or goes on with the loaded one. Called before the loader's own iterator is made."""
        self.sources, self._workers = sources, workers
        loaded, resumption = self._loaded, self._resumption
        if loaded is None and resumption is not None:  # given up without a fetch, for the next epoch
            loaded = replace(resumption.position, epoch=EpochState.OVER)
        self._loaded = self._resumption = None
        self._later.clear()
        self._cursor = Cursor(Origin(workers), length)
        if loaded is not None:
            if loaded.epoch is EpochState.RUNNING:
                last = loaded if loaded.exhausted else None
                self._cursor = Cursor(loaded.origin, length, loaded.delivered, last)
            self._resumption = _Resumption(loaded, self._cursor, loaded.fetch)
            _awaiting_first_fetch.add(self)
        return self._cursor

    def begin_late(self) -> None:
        """Begins the epoch behind a loaded position at the first fetch: by then Lightning has set the epoch."""
        if self.next_epoch is not None:
            self._restore_sources_between_epochs(self.next_epoch)
        _awaiting_first_fetch.discard(self)
        self._resumption = None

    def _restore_sources_between_epochs(self, position: Position) -> None:
        position.fetch.restore_sources([source for source in self.sources if not source.set_by_consumer])

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
        if self.resuming is None:
            origin.iterated = RandomState.capture(self.sources)
            return self._record(iter(sampler), origin)
        self._index_iterations += 1
        # With workers, torch calls iter() once in vain, draws the workers' seed, and calls it again: the first call has
        # to take its natural way for the seed to be the same.
        in_vain = self._workers and self._index_iterations == 1
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
        deque(islice(indices, None if position.exhausted else position.delivered), maxlen=0)
        if origin.workers:  # the next index had been drawn before the fetch began, too
            ahead.extend(islice(indices, 1))
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


class CountedBatches(Iterator[Any]):
    """A loader's own iterator, with every fetch reported to the tracker; all else is the iterator's."""

    def __init__(
        self, iterate: Callable[[], Any], tracker: PositionTracker, cursor: Cursor, read_inner: ReadInner
    ) -> None:
        self._tracker, self._cursor, self._iterate, self._read_inner = tracker, cursor, iterate, read_inner
        self._batches: Any = None
        if tracker.next_epoch is not None:
            _awaiting_epoch[id(tracker)] = self  # in place of one that was given up
        else:
            self._batches = iterate()

    def __next__(self) -> Any:
        tracker, cursor = self._tracker, self._cursor
        if self._batches is None:
            self._batches = self._begin_epochs()
        position = tracker.begin_fetch(cursor, self._inner)
        done: Position | None = None
        try:
            batch = next(self._batches)
            cursor.delivered += 1
            done = position
        except StopIteration:
            cursor.last = cursor.last or position
            if cursor.length is not None:  # else Lightning looked ahead for the end, which is no fetch to repeat
                done = position
            raise
        finally:
            tracker.end_fetch(done)
        return batch

    def _begin_epochs(self) -> Any:
        # Loaders of a trainer begin their epochs one after the other, before the first fetch from any; or all are asked
        # for the end of the last one.
        start = self._tracker.next_epoch
        assert start is not None
        together = [batches for batches in _awaiting_epoch.values() if batches._awaits_same(start)]
        if any(batches._tracker.next_epoch.epoch is EpochState.ENDING for batches in together):
            raise StopIteration
        start.fetch.restore_process()
        for batches in together:
            del _awaiting_epoch[id(batches._tracker)]
            batches._tracker.begin_late()
            batches._batches = batches._iterate()
        return self._batches

    def _awaits_same(self, start: Position) -> bool:
        mine = self._tracker.next_epoch
        return mine is not None and (mine is start or mine.fetch.same_process_state(start.fetch))

    def _inner(self) -> Any:
        return self._read_inner() if self._cursor.last is None else self._cursor.last.inner

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name == "_batches":
            raise AttributeError(name)
        return getattr(self._batches, name)


_awaiting_epoch: weakref.WeakValueDictionary[int, CountedBatches] = weakref.WeakValueDictionary()
