"""The page in which a worker says when to send: what is written is read, what is damaged harms nothing but timing."""

from __future__ import annotations

import dataclasses
import os
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.dataplane import pace_page
from lightning_gemini.dataplane.pace_page import MAX_SPANS, WORDS, Pace, PacePage, Plan, Span
from lightning_gemini.dataplane.slab import HEADER_BYTES, Buffer, Slab
from lightning_gemini.errors import ConfigurationError
from tests.dataplane.machines import content_of, shard_bytes, write_version
from tests.dataplane.test_flipped_bytes import NEW, OWNER, SIZE


def two_sides() -> tuple[PacePage, PacePage]:
    """A worker's and its agent's object over the same memory."""
    words = memoryview(bytearray(8 * WORDS)).cast("Q")
    return PacePage(words), PacePage(words)


def plan(page: PacePage, usable_s: tuple[float, ...] = (0.5, 0.25), **fields: float | bool | tuple[float, ...]) -> None:
    given = {"bandwidth_bytes_per_s": 1e9, "startup_s": 1e-4, "chunk_bytes": 1000, "window_bytes": 4000, **fields}
    page.set_plan(usable_s, **given)  # type: ignore[arg-type]


def test_a_page_of_zeros_lets_everything_go() -> None:
    page = PacePage.private()
    assert (page.pace, page.rushing, page.held, page.plan()) == (Pace.FREE, False, False, None)
    assert page.span() == Span(0, 0, False)
    assert (page.sent, page.take_peak()) == (0, 0)


def test_what_the_worker_says_is_what_the_agent_reads() -> None:
    worker, agent = two_sides()
    for on in (True, False):
        worker.set_pace(Pace.PACED if on else Pace.FREE)
        worker.rush(on)
        worker.hold(on)
        assert (agent.pace, agent.rushing, agent.held) == (Pace.PACED if on else Pace.FREE, on, on)
    plan(worker, one_chunk=True, iteration_s=2.0, lead=0.125, periods_s=(1.25, 0.75))
    lengths_ns, periods_ns = (500_000_000, 250_000_000), (1_250_000_000, 750_000_000)
    expected = Plan(lengths_ns, 10**9, 100_000, 1000, 4000, True, 2 * 10**9, 125_000, periods_ns)
    assert agent.plan() == expected
    plan(worker, one_chunk=True, iteration_s=2.0, lead=0.125)
    assert agent.plan() == dataclasses.replace(expected, period_ns=(0, 0))


def test_a_worker_that_left_steers_no_more() -> None:
    worker, agent = two_sides()
    worker.set_pace(Pace.PACED)
    worker.rush(True)
    worker.hold(True)
    agent.reset()
    assert (worker.pace, worker.rushing, worker.held) == (Pace.FREE, False, False)


def test_spans_open_and_close() -> None:
    worker, agent = two_sides()
    for index in (0, 1, 5, MAX_SPANS, MAX_SPANS + 10**6, 0):
        before = time.monotonic_ns()
        worker.open_span(index)
        found = agent.span()
        assert (found.index, found.open) == (index, True)
        assert before <= found.began_ns <= time.monotonic_ns()
        worker.close_span()
        assert agent.span() == Span(index, found.began_ns, False)


def test_two_visits_to_a_span_can_be_told_apart() -> None:
    worker, agent = two_sides()
    words = set()
    for _ in range(3):
        worker.open_span(0)
        words.add(agent.marks()[0])
    assert len(words) == 3


def test_a_device_writes_a_span_with_one_copy_of_two_words() -> None:
    worker, agent = two_sides()
    worker.open_span(3)
    worker.span_words[:] = memoryview(bytearray(16)).cast("Q")
    worker.span_words[0] = PacePage.encode_span(8, True)
    assert agent.span() == Span(8, 0, True)


def test_the_time_of_the_next_span_is_not_taken_for_that_of_the_last() -> None:
    """The reader is interrupted between the two words, and the worker goes on meanwhile."""
    worker, agent = two_sides()
    worker.open_span(1)
    first = agent.span()

    class Interrupted:
        def __init__(self, words: memoryview) -> None:
            self.words, self.reads = words, 0

        def __getitem__(self, place: int) -> int:
            self.reads += 1
            if self.reads == 2:
                worker.open_span(2)
            return int(self.words[place])

    agent.words = Interrupted(agent.words)  # type: ignore[assignment]
    between = agent.span()
    assert (between.index, between.open) == (1, False)
    assert agent.span().index == 2
    assert agent.span().began_ns >= first.began_ns


def test_a_span_ends_before_the_next_one_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, agent = two_sides()
    worker.open_span(1)
    seen = []
    monkeypatch.setattr(pace_page.time, "monotonic_ns", lambda: seen.append(agent.span().open) or 5)
    worker.open_span(2)
    assert seen == [False]
    assert agent.span() == Span(2, 5, True)


def test_peak_and_progress() -> None:
    worker, agent = two_sides()
    for size in (5, 9, 7):
        agent.note_in_flight(size)
        agent.note_sent(size)
    assert (worker.take_peak(), worker.take_peak(), worker.sent) == (9, 0, 9)
    worker.restart_sent()
    assert agent.sent == 0


# -- plans -------------------------------------------------------------------------------------------------------------


@given(
    usable_s=st.lists(st.floats(0, 5000), max_size=50),
    numbers=st.tuples(st.floats(1, 1e12), st.floats(0, 10), st.integers(1, 2**40), st.integers(0, 2**40)),
)
def test_any_plan_is_read_as_it_was_written(usable_s: list[float], numbers: tuple[float, float, int, int]) -> None:
    worker, agent = two_sides()
    bandwidth, startup_s, chunk_bytes, more_bytes = numbers
    for _ in range(2):  # over another one
        plan(
            worker,
            tuple(usable_s),
            bandwidth_bytes_per_s=bandwidth,
            startup_s=startup_s,
            chunk_bytes=chunk_bytes,
            window_bytes=chunk_bytes + more_bytes,
        )
        found = agent.plan()
        assert found is not None
        limit_us = 2**32 - 1
        assert found.usable_ns == tuple(1000 * min(int(length * 1e6), limit_us) for length in usable_s)
        assert (found.bandwidth_bytes_per_s, found.startup_ns) == (int(bandwidth), int(startup_s * 1e9))
        assert (found.chunk_bytes, found.window_bytes) == (chunk_bytes, chunk_bytes + more_bytes)
        usable_s = usable_s[::2]


def test_the_longest_plan_fits_and_a_longer_one_is_refused() -> None:
    worker, agent = two_sides()
    plan(worker, (1.0,) * MAX_SPANS, periods_s=(2.0,) * MAX_SPANS)
    found = agent.plan()
    assert found is not None
    assert (found.usable_ns, found.period_ns) == ((10**9,) * MAX_SPANS, (2 * 10**9,) * MAX_SPANS)
    with pytest.raises(ConfigurationError, match=f"at most {MAX_SPANS} spans, this iteration has {MAX_SPANS + 1}"):
        plan(worker, (1.0,) * (MAX_SPANS + 1))
    assert agent.plan() == found


@pytest.mark.parametrize(
    "fields",
    [
        {"bandwidth_bytes_per_s": 0.0},
        {"bandwidth_bytes_per_s": float("nan")},
        {"chunk_bytes": 0},
        {"chunk_bytes": 5000},
        {"startup_s": -1.0},
        {"startup_s": float("nan")},
        {"usable_s": (1.0, -1e-9)},
        {"usable_s": (float("nan"),)},
        {"periods_s": (1.0, -1e-9)},
        {"periods_s": (float("nan"), 1.0)},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="got"):
        plan(PacePage.private(), **fields)  # type: ignore[arg-type]


def test_periods_are_of_the_spans() -> None:
    with pytest.raises(ValueError, match="2 spans needs as many periods or none, got 1"):
        plan(PacePage.private(), periods_s=(1.0,))


def test_a_plan_is_not_read_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, agent = two_sides()
    plan(worker)
    seen = []

    def checksum(numbers: bytes, table: bytes) -> int:
        monkeypatch.undo()
        seen.append(agent.plan())
        return pace_page._checksum(numbers, table)

    monkeypatch.setattr(pace_page, "_checksum", checksum)
    worker._write_plan(bytes(pace_page._PLAN.size), b"")
    assert seen == [None]
    assert agent.plan() is not None


def test_no_flipped_bit_makes_another_plan() -> None:
    worker, agent = two_sides()
    plan(worker, periods_s=(0.75, 0.5))
    whole = agent.plan()
    for place in range(8 * pace_page._SEQUENCE, pace_page._TABLE_BYTE + 16):
        for bit in range(8):
            worker._bytes[place] ^= 1 << bit
            assert PacePage(worker.words).plan() in (whole, None)
            assert agent.plan() in (whole, None)
            worker._bytes[place] ^= 1 << bit


def test_no_flipped_bit_holds_or_paces_for_ever() -> None:
    """What would keep the agent from sending without anybody saying so."""
    page = PacePage.private()
    for place in range(8 * 16):
        for bit in range(8):
            page._bytes[place] ^= 1 << bit
            assert (page.pace, page.held) == (Pace.FREE, False)
            page._bytes[place] ^= 1 << bit


# -- in a slab ---------------------------------------------------------------------------------------------------------


def test_the_page_is_in_the_slabs_shared_memory_and_survives_its_growth() -> None:
    slab = Slab.create(OWNER, SIZE)
    again = Slab(*(Buffer(os.dup(buffer.fd)) for buffer in slab.buffers))
    slab.pace.set_pace(Pace.PACED)
    plan(slab.pace)
    for size in (SIZE, 50 * SIZE + HEADER_BYTES):
        write_version(again.buffers[0], NEW, size)
        slab.pace.open_span(size)
        assert again.pace.span().index == size
        assert again.pace.pace is Pace.PACED
        assert again.pace.plan() == slab.pace.plan()
        assert content_of(slab.buffers[0]) == shard_bytes(OWNER, NEW, size)
    slab.close()
    slab.pace.open_span(7)  # nobody sees it
    assert again.pace.span().index != 7
    again.close()
    again.close()


def test_noise_in_the_page_touches_no_version_and_breaks_no_reader(seed: int) -> None:
    noise = random.Random(seed)
    slab = Slab.create(OWNER, SIZE)
    content = write_version(slab.buffers[0], NEW, SIZE)
    page = slab.pace
    for _ in range(50):
        page._bytes[:] = noise.randbytes(8 * WORDS)
        assert page.plan() is None
        assert page.pace is Pace.FREE
        page.span()
        assert content_of(slab.buffers[0]) == content
    plan(page)
    assert page.plan() is not None
    slab.close()
