"""Replication that waits for its turn on the network, over real sockets: nothing in closed spans, and nothing lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.pace_page import Pace, PacePage
from lightning_gemini.dataplane.pacer import Pacer, Underway
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.wire import FRAME_BYTES
from tests.dataplane.machines import complete_ids, content_of, shard_bytes, write_version
from tests.dataplane.test_replicator import Replicating, introduce, v
from tests.dataplane.waiting import wait_until

PIECE = 10_000
CHUNKS = 40


class Asked:
    """What pacers were asked, and whether a span was open when they said yes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refusals = 0
        self.sent_in_closed_spans: list[int] = []
        real = Pacer.allowance

        def allowance(pacer: Pacer, left_bytes: int, underway: Underway, link: int = 0) -> int:
            free = pacer.page.pace is Pace.FREE or pacer.page.rushing
            is_open = pacer.page.span().open
            size = real(pacer, left_bytes, underway, link)
            self.refusals += not size
            if size and not is_open and not free and not pacer.page.span().open:
                self.sent_in_closed_spans.append(size)
            return size

        monkeypatch.setattr(Pacer, "allowance", allowance)

    def wait_for_refusals(self, count: int) -> None:
        enough = self.refusals + count
        wait_until(lambda: self.refusals >= enough, f"{count} more questions that are answered no")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


@pytest.fixture
def size(small_chunks: int) -> int:
    return CHUNKS * small_chunks + 77


@pytest.fixture
def start() -> Iterator[Callable[..., list[Replicating]]]:
    with ExitStack() as stack:

        def make(machines: int, **fields: int) -> list[Replicating]:
            made = [stack.enter_context(Replicating(rank, machines, **fields)) for rank in range(machines)]
            introduce(made)
            return made

        yield make


Start = Callable[..., list[Replicating]]


def pace(page: PacePage, *, piece: int = PIECE, usable_s: float = 1000.0, period_s: float = 0.0) -> None:
    """Spans so long that nothing but their end ends them, and one small piece at a time."""
    page.set_plan(
        [usable_s] * 3,
        bandwidth_bytes_per_s=1e9,
        startup_s=0.0,
        chunk_bytes=piece,
        window_bytes=piece,
        periods_s=[period_s] * 3,
    )
    page.set_pace(Pace.PACED)


def assert_a_rush_sends_the_rest(page: PacePage, buffer: Buffer, holder: Replicating, asked: Asked, size: int) -> None:
    """What a closed span keeps back leaves at once when training waits for it."""
    page.close_span()
    asked.wait_for_refusals(3)
    assert buffer.acked is None
    page.rush(True)
    wait_until(lambda: buffer.acked == v(1), "acknowledged")
    assert_held(holder, 0, v(1), size)


def chunks_at(holder: Replicating, owner: int) -> int:
    slab = holder.store.slab(owner)
    return max((buffer.chunks_ready for buffer in slab.buffers if not buffer.view.complete), default=0) if slab else 0


def publish(machine: Replicating, owner: int, version: VersionId, size: int) -> Buffer:
    slab = machine.slab(owner)
    newest = slab.newest_started()
    buffer = slab.buffers[1] if newest is slab.buffers[0] else slab.buffers[0]
    write_version(buffer, version, size)
    slab.pace.restart_sent()
    machine.replicator.notify()
    return buffer


def assert_held(holder: Replicating, owner: int, version: VersionId, size: int) -> None:
    kept = holder.store.complete_buffer(owner, version)
    assert kept is not None
    assert content_of(kept) == shard_bytes(owner, version, size)


def test_only_open_spans_carry_anything(start: Start, asked: Asked, size: int) -> None:
    sender, holder = start(2)
    page = sender.slab(0).pace
    pace(page)
    buffer = publish(sender, 0, v(1), size)
    asked.wait_for_refusals(3)
    assert (page.sent, chunks_at(holder, 0)) == (0, 0)
    for index in range(3):
        before = page.sent
        page.open_span(index)
        wait_until(lambda before=before: page.sent > before + 3 * PIECE, "pieces leave")  # type: ignore[misc]
        page.close_span()
        asked.wait_for_refusals(3)  # whatever was decided before is on its way by now
        sent = page.sent
        asked.wait_for_refusals(20)
        assert page.sent == sent < size
        assert buffer.acked is None
    page.open_span(0)
    wait_until(lambda: buffer.acked == v(1), "acknowledged")
    assert_held(holder, 0, v(1), size)
    assert not asked.sent_in_closed_spans
    assert 0 <= page.take_peak() - PIECE <= FRAME_BYTES


def test_a_span_that_is_used_up_carries_nothing_more(start: Start, asked: Asked, size: int) -> None:
    sender, _ = start(2)
    page = sender.slab(0).pace
    pace(page, usable_s=0.02)
    page.open_span(0)
    page.words[3] -= 10**9  # it has been open for a second
    buffer = publish(sender, 0, v(1), size)
    asked.wait_for_refusals(20)
    assert page.sent == 0
    page.rush(True)
    wait_until(lambda: buffer.acked == v(1), "acknowledged")


def test_a_rush_sends_the_rest_at_once_from_the_middle_of_a_chunk(start: Start, asked: Asked, size: int) -> None:
    sender, holder = start(2)
    page = sender.slab(0).pace
    pace(page)
    page.open_span(0)
    buffer = publish(sender, 0, v(1), size)
    wait_until(lambda: page.sent > PIECE, "a piece is sent")
    assert_a_rush_sends_the_rest(page, buffer, holder, asked, size)
    assert page.sent == size


def test_who_sleeps_till_the_next_span_hears_of_a_rush_and_of_a_span_before_its_time(
    start: Start, asked: Asked, size: int
) -> None:
    sender, holder = start(2)
    page = sender.slab(0).pace
    pace(page, period_s=2000.0)
    page.open_span(0)
    page.close_span()
    buffer = publish(sender, 0, v(1), size)
    asked.wait_for_refusals(3)
    assert page.sent == 0
    page.open_span(1)
    wait_until(lambda: page.sent > PIECE, "pieces leave")
    assert_a_rush_sends_the_rest(page, buffer, holder, asked, size)
    assert not asked.sent_in_closed_spans


def test_a_large_piece_stops_where_its_span_does(
    start: Start, asked: Asked, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may need the network earlier than usual: what was allowed but not sent waits."""
    sender, holder = start(2)
    page = sender.slab(0).pace
    page.set_plan([1000.0], bandwidth_bytes_per_s=1e6, startup_s=0.0, chunk_bytes=size, window_bytes=size)
    page.set_pace(Pace.PACED)
    real = wire.send_all

    def closing(sock: Any, header: bytes, payload: Any) -> None:
        real(sock, header, payload)
        if payload:
            page.close_span()

    with monkeypatch.context() as patched:
        patched.setattr(wire, "send_all", closing)
        page.open_span(0)
        buffer = publish(sender, 0, v(1), size)
        asked.wait_for_refusals(5)
        assert page.take_peak() == size  # all of it was allowed
        assert 0 < page.sent < size / 2
    page.rush(True)
    wait_until(lambda: buffer.acked == v(1), "acknowledged")
    assert_held(holder, 0, v(1), size)


def test_pieces_cross_the_slabs_chunks(start: Start, asked: Asked, size: int, small_chunks: int) -> None:
    """One piece is as large as the span allows, whatever the shard's own chunks."""
    sender, holder = start(2)
    page = sender.slab(0).pace
    piece = 5 * small_chunks + 1234
    page.set_plan(
        [1000.0], bandwidth_bytes_per_s=piece / 1000, startup_s=0.0, chunk_bytes=1, window_bytes=1, one_chunk=True
    )
    page.set_pace(Pace.PACED)
    buffer = publish(sender, 0, v(1), size)
    asked.wait_for_refusals(2)
    page.open_span(0)
    wait_until(lambda: chunks_at(holder, 0) == 5, "five chunks arrive")
    asked.wait_for_refusals(5)
    assert page.sent <= piece
    assert piece - page.take_peak() < 0.01 * piece
    page.rush(True)
    wait_until(lambda: buffer.acked == v(1), "acknowledged")


def test_all_holders_of_all_ranks_are_served_side_by_side(start: Start, asked: Asked, size: int) -> None:
    """Ranks of a machine, each in its own spans; holders of a rank, sharing what it may send."""
    cluster = start(3, nproc=2, replicas=3)
    sender = cluster[0]
    for owner in (0, 1):
        pace(sender.slab(owner).pace)
    buffers = [publish(sender, owner, v(1), size) for owner in (0, 1)]
    sender.slab(1).pace.open_span(0)
    wait_until(lambda: buffers[1].acked == v(1), "the rank whose span is open gets through")
    assert sender.slab(0).pace.sent == 0
    assert 0 <= sender.slab(1).pace.take_peak() - PIECE <= FRAME_BYTES  # of both holders together
    sender.slab(0).pace.open_span(0)
    wait_until(lambda: buffers[0].acked == v(1), "and so does the other")
    for holder in cluster[1:]:
        for owner in (0, 1):
            assert_held(holder, owner, v(1), size)
    assert not asked.sent_in_closed_spans


def test_a_version_that_is_given_up_in_the_middle_of_a_chunk_costs_nothing_else(
    start: Start, asked: Asked, size: int
) -> None:
    sender, holder = start(2)
    first = publish(sender, 0, v(1), size)
    wait_until(lambda: first.acked == v(1), "the first is acknowledged")
    page = sender.slab(0).pace
    pace(page)
    torn = publish(sender, 0, v(2), size)
    page.open_span(0)
    wait_until(lambda: page.sent > 0, "it is on its way")
    page.close_span()
    asked.wait_for_refusals(3)
    assert page.sent < size
    torn.drop()
    wait_until(lambda: chunks_at(holder, 0) == 0 and not writing(holder), "the holder forgets it")
    assert complete_ids(holder.store.slab(0)) == [v(1)]
    next_one = publish(sender, 0, v(3), size)
    page.rush(True)
    wait_until(lambda: next_one.acked == v(3), "the next one gets through")
    assert_held(holder, 0, v(3), size)


def writing(holder: Replicating) -> bool:
    return holder.store.writer(0).locked()


# -- versions that the worker sends by itself --------------------------------------------------------------------------


def test_the_agent_keeps_away_while_the_worker_sends_by_itself(start: Start, asked: Asked, size: int) -> None:
    sender, holder = start(2)
    page = sender.slab(0).pace
    page.hold(True)
    buffer = publish(sender, 0, v(1), size)
    sender.replicator.note_held(0, 1, v(1), generation=0)  # said by a worker of another generation
    assert buffer.acked is None
    sender.replicator.note_held(0, 1, v(1), generation=1)
    assert buffer.acked == v(1)
    assert holder.store.slab(0) is None
    buffer = publish(sender, 0, v(2), size)
    page.hold(False)  # it cannot go on
    sender.replicator.notify()
    wait_until(lambda: buffer.acked == v(2), "the agent takes over")
    assert_held(holder, 0, v(2), size)


def test_a_push_ends_when_the_worker_begins_to_send_by_itself(start: Start, asked: Asked, size: int) -> None:
    sender, holder = start(2)
    page = sender.slab(0).pace
    pace(page)
    publish(sender, 0, v(1), size)
    page.open_span(0)
    wait_until(lambda: page.sent > 0, "it is on its way")
    page.hold(True)
    wait_until(lambda: holder.store.slab(0) is not None and not writing(holder), "the holder takes from others now")
    assert complete_ids(holder.store.slab(0)) == []


def test_closing_ends_a_paced_push_at_once(start: Start, asked: Asked, size: int) -> None:
    sender, holder = start(2)
    pace(sender.slab(0).pace)
    sender.slab(0).pace.open_span(0)
    publish(sender, 0, v(1), size)
    wait_until(lambda: sender.slab(0).pace.sent > 0, "it is on its way")
    sender.slab(0).pace.close_span()
    sender.replicator.close()
    ended = lambda: not [one for one in threading.enumerate() if one.name == "replicate-1"]  # noqa: E731
    wait_until(ended, "the thread ended", timeout_s=5.0)
    wait_until(lambda: not writing(holder), "the holder gave up, too")
    assert complete_ids(holder.store.slab(0)) == []
