from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import product

import pytest

from lightning_gemini.core.consistency import (
    BufferView,
    newest_complete,
    replica_place,
    retrieval_place,
    superseded,
    writable_buffer,
)
from lightning_gemini.core.recovery import VersionId

IDS = [None, VersionId(1, 1), VersionId(1, 2), VersionId(1, 3), VersionId(2, 1), VersionId(2, 2)]
VIEWS = [BufferView(version, complete) for version, complete in product(IDS, [False, True])]
PAIRS = list(product(VIEWS, repeat=2))


def held(view: BufferView) -> VersionId | None:
    return view.id if view.complete else None


def test_newest_complete_ignores_torn_and_unused_buffers() -> None:
    for pair in PAIRS:
        known = [version for view in pair if (version := held(view)) is not None]
        assert newest_complete(pair) == (max(known) if known else None)
    assert newest_complete(()) is None


@pytest.mark.parametrize("committed", IDS)
def test_writable_buffer_enumerated(committed: VersionId | None) -> None:
    for pair in PAIRS:
        values = [held(view) for view in pair]
        # Worth protecting: complete, and committed or newer (it may be committed already, unheard of here).
        needed = [value is not None and (committed is None or value >= committed) for value in values]
        index = writable_buffer(pair, committed)
        if all(needed):
            assert index is None
            continue
        assert index is not None
        assert not needed[index]
        other = 1 - index
        if not needed[other]:  # free choice: lose the least
            assert values[index] is None or (values[other] is not None and values[index] <= values[other])


@pytest.mark.parametrize(
    ("first", "second", "committed", "expected"),
    [
        ((None, False), (None, False), None, 0),
        ((1, True), (None, False), None, 1),
        ((1, True), (2, True), None, None),
        ((1, True), (2, True), 1, None),  # 2 may be committed already: skip
        ((1, True), (2, True), 2, 0),
        ((3, True), (2, True), 3, 1),
        ((1, True), (2, False), 1, 1),  # torn
        ((1, True), (2, True), 5, 0),  # fell behind: keep the newer
    ],
)
def test_writable_buffer_examples(
    first: tuple[int | None, bool], second: tuple[int | None, bool], committed: int | None, expected: int | None
) -> None:
    def view(version: int | None, complete: bool) -> BufferView:
        return BufferView(None if version is None else VersionId(1, version), complete)

    known = None if committed is None else VersionId(1, committed)
    assert writable_buffer((view(*first), view(*second)), known) == expected


@pytest.mark.parametrize("loaded", IDS)
def test_superseded_frees_a_buffer_and_never_the_loaded_version(loaded: VersionId | None) -> None:
    for pair in PAIRS:
        stale = superseded(pair, loaded)
        assert all(pair[index].id != loaded for index in stale if loaded is not None)
        left = tuple(BufferView(None, False) if index in stale else view for index, view in enumerate(pair))
        newest = newest_complete(left)
        assert newest is None or (loaded is not None and newest <= loaded)
        if loaded is None or pair[0] != pair[1]:  # a slab never holds one version twice
            assert writable_buffer((left[0], left[1]), loaded) is not None


@pytest.mark.parametrize("kept", IDS)
@pytest.mark.parametrize("version", [value for value in IDS if value is not None])
def test_a_replica_overwrites_nothing_that_may_be_the_common_version(
    version: VersionId, kept: VersionId | None
) -> None:
    for pair in PAIRS:
        if version in [held(view) for view in pair] or (pair[0].id == pair[1].id and pair[0].id):
            continue
        place = replica_place((pair[0], pair[1]), version, kept)
        between = [view.id is not None and kept is not None and kept < view.id < version for view in pair]
        assert list(place.given_up) == [index for index in (0, 1) if between[index]]
        left = [None if between[index] else held(pair[index]) for index in (0, 1)]
        if place.index is None:
            lowest = min(value for value in left if value is not None)
            assert None not in left
            assert lowest > version or lowest == kept
        elif (overwritten := left[place.index]) is not None:
            other = left[1 - place.index]
            assert other is not None
            assert overwritten < other, "the newest complete version stays"
            assert overwritten < version, "nothing makes room for what is older"
        if kept is not None and kept < version and place.index is not None and kept in left:
            assert left[place.index] != kept, "what the owner keeps stays"


@pytest.mark.parametrize("own", [True, False])
def test_a_retrieval_overwrites_what_is_newer_first(own: bool) -> None:
    for pair, version in product(PAIRS, [value for value in IDS if value is not None]):
        values = [held(view) for view in pair]
        if version in values or (pair[0].id == pair[1].id and pair[0].id):
            continue
        index = retrieval_place((pair[0], pair[1]), version, own=own)
        older = [value for value in values if value is not None and value < version]
        if index is None:
            assert (own, len(older)) == (False, 2)
        elif (overwritten := values[index]) is not None and overwritten < version:
            assert own
            assert older == values or older == values[::-1], "there was no other room"
            assert overwritten == min(older)


@dataclass(frozen=True)
class Rank:
    """One rank's slab in the model below; a version is its step."""

    buffers: tuple[BufferView, BufferView]
    step: int
    known: VersionId | None


EMPTY = BufferView(None, False)


def moves(ranks: tuple[Rank, ...], committed: VersionId | None, last_step: int) -> list[tuple[Rank, ...]]:
    """Returns every state one move away: a rank begins or skips a version, finishes one, or hears of a commit."""
    reached: list[tuple[Rank, ...]] = []
    for index, rank in enumerate(ranks):

        def become(new: Rank, index: int = index) -> None:
            reached.append((*ranks[:index], new, *ranks[index + 1 :]))

        writing = [i for i, buffer in enumerate(rank.buffers) if buffer.id is not None and not buffer.complete]
        if writing:
            become(replace(rank, buffers=put(rank.buffers, writing[0], complete=True)))
        elif rank.step < last_step:
            version = VersionId(1, rank.step + 1)
            free = writable_buffer(rank.buffers, rank.known)
            stepped = replace(rank, step=rank.step + 1)
            become(stepped)  # skips, of its own accord or because it must
            if free is not None:
                become(replace(stepped, buffers=put(rank.buffers, free, version)))
        if committed is not None and committed != rank.known:
            become(replace(rank, known=committed))
    return reached


def put(
    buffers: tuple[BufferView, BufferView], index: int, version: VersionId | None = None, complete: bool = False
) -> tuple[BufferView, BufferView]:
    view = BufferView(version if version is not None else buffers[index].id, complete)
    return (view, buffers[1]) if index == 0 else (buffers[0], view)


def common(ranks: tuple[Rank, ...]) -> VersionId | None:
    """Returns the newest version that is complete in every rank's slab."""
    sets = [{value for view in rank.buffers if (value := held(view)) is not None} for rank in ranks]
    return max(set.intersection(*sets), default=None)


def test_a_common_version_survives_every_interleaving() -> None:
    """Invariant 1, exhaustively: ranks of any speed, commits heard of at any later time, versions skipped at will."""
    start = (Rank((EMPTY, EMPTY), 0, None),) * 2
    first: tuple[tuple[Rank, ...], VersionId | None] = (start, None)
    seen, queue = {first}, deque([first])
    commits = set()
    while queue:
        ranks, committed = queue.popleft()
        for after in moves(ranks, committed, last_step=4):
            now = common(after)
            assert committed is None or (now is not None and now >= committed), (ranks, after)
            state = (after, now)
            commits.add(now)
            if state not in seen:
                seen.add(state)
                queue.append(state)
    assert commits == {None, *(VersionId(1, step) for step in range(1, 5))}  # the model does reach every commit
