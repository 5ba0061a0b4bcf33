"""The iterators of resumable loaders."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from lightning_gemini.callbacks.data_position.position import Position
from lightning_gemini.callbacks.data_position.position_tracker import Cursor, PositionTracker, ReadInner, moments

__all__ = ["CountedBatches"]


class CountedBatches(Iterator[Any]):
    """A loader's own iterator, with every fetch reported to the tracker; all else is the iterator's."""

    def __init__(
        self, iterate: Callable[[], Any], tracker: PositionTracker, cursor: Cursor, read_inner: ReadInner
    ) -> None:
        self._tracker, self._cursor, self._iterate, self._read_inner = tracker, cursor, iterate, read_inner
        self._made = next(moments)
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
        together = [batches for batches in list(_awaiting_epoch.values()) if batches._begins_with(self._tracker, start)]
        if any(batches._tracker.ending for batches in together):
            raise StopIteration
        start.fetch.restore_process()
        for batches in together:
            del _awaiting_epoch[id(batches._tracker)]
            batches._tracker.begin_late()
            batches._batches = batches._iterate()
        return self._batches

    def _begins_with(self, tracker: PositionTracker, start: Position) -> bool:
        mine = self._tracker.next_epoch
        if mine is None or self._made < tracker.loaded_at:  # or left over from an earlier resume in this process
            return False
        return mine is start or mine.fetch.same_process_state(start.fetch)

    def _inner(self) -> Any:
        return self._read_inner() if self._cursor.last is None else self._cursor.last.inner

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name == "_batches":
            raise AttributeError(name)
        return getattr(self._batches, name)


_awaiting_epoch: weakref.WeakValueDictionary[int, CountedBatches] = weakref.WeakValueDictionary()
