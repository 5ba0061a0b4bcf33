from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.core.schedule import MAX_CHUNKS, Chunk, Schedule, schedule_chunks
from lightning_gemini.errors import ConfigurationError

MB = 10**6
PAPER: dict[str, Any] = {
    "replicas": 2,
    "bandwidth_bytes_per_s": 6250 * MB,
    "startup_s": 1e-4,
    "buffer_bytes": 128 * MB,
    "sub_buffers": 4,
    "safety": 0.8,
}


def busy_s(chunks: tuple[Chunk, ...], link: dict[str, Any]) -> float:
    return sum(link["startup_s"] + chunk.size_bytes / link["bandwidth_bytes_per_s"] for chunk in chunks)


def per_span(schedule: Schedule) -> list[tuple[int, int]]:
    return [(len(span), sum(chunk.size_bytes for chunk in span)) for span in schedule.spans]


@pytest.mark.parametrize(
    ("spans_s", "checkpoint_bytes", "replicas", "expected"),
    [
        ([0.05, 0.01, 0.10, 0.20], 1000 * MB, 2, [(8, 245 * MB), (2, 48_750_000), (16, 490 * MB), (7, 216_250_000)]),
        ([0.1] * 4, 600 * MB, 2, [(16, 490 * MB), (4, 110 * MB), (0, 0), (0, 0)]),
        ([0.1] * 4, 600 * MB, 3, [(16, 490 * MB), (16, 490 * MB), (7, 220 * MB), (0, 0)]),
        ([5e-5, 0.1], 100 * MB, 2, [(0, 0), (4, 100 * MB)]),
    ],
)
def test_vectors(spans_s: list[float], checkpoint_bytes: int, replicas: int, expected: list[tuple[int, int]]) -> None:
    schedule = schedule_chunks(spans_s, checkpoint_bytes, **{**PAPER, "replicas": replicas})
    assert per_span(schedule) == expected
    assert schedule.overrun_s == 0.0


def test_the_chunks_of_a_vector_one_by_one() -> None:
    schedule = schedule_chunks([0.1] * 4, 600 * MB, **{**PAPER, "replicas": 3})
    sizes = [[(chunk.copy, chunk.size_bytes / MB) for chunk in span] for span in schedule.spans]
    assert sizes[0] == [(0, 32)] * 15 + [(0, 10)]
    assert sizes[1] == [(0, 32)] * 3 + [(0, 14)] + [(1, 32)] * 11 + [(1, 28)]
    assert sizes[2] == [(1, 32)] * 6 + [(1, 28)]


def test_what_does_not_fit_goes_into_the_last_span_and_lengthens_it() -> None:
    link = {**PAPER, "startup_s": 0.0, "safety": 1.0, "bandwidth_bytes_per_s": 1000.0, "buffer_bytes": 40}
    schedule = schedule_chunks([0.025, 0.015], 100, **link)
    assert [[chunk.size_bytes for chunk in span] for span in schedule.spans] == [[10, 10, 5], [10] * 7 + [5]]
    assert schedule.overrun_s == pytest.approx(0.060, rel=1e-9)


@pytest.mark.parametrize("size", [1, 9, 10, 11, 40, 70])
def test_a_span_of_exactly_the_right_length_is_enough(size: int) -> None:
    """Sums in floating point must not push the last byte out."""
    link = {**PAPER, "bandwidth_bytes_per_s": 300.0, "startup_s": 0.1, "safety": 0.7, "buffer_bytes": 40}
    needed_s = (-(-size // 10) * 0.1 + size / 300) / 0.7
    assert schedule_chunks([needed_s, 0.0], size, **link).spans[1] == ()
    assert schedule_chunks([needed_s], size, **link).overrun_s == 0.0
    assert schedule_chunks([0.999 * needed_s], size, **link).overrun_s == pytest.approx(0.0007 * needed_s, rel=1e-6)


@pytest.mark.parametrize(("checkpoint_bytes", "replicas"), [(1000, 1), (0, 3), (0, 1)])
def test_nothing_to_send(checkpoint_bytes: int, replicas: int) -> None:
    schedule = schedule_chunks([0.1, 0.0], checkpoint_bytes, **{**PAPER, "replicas": replicas})
    assert schedule == Schedule(((), ()), 0.0)


def test_a_buffer_that_the_sub_buffers_do_not_divide() -> None:
    schedule = schedule_chunks([1.0], 100, **{**PAPER, "buffer_bytes": 39})
    assert [chunk.size_bytes for chunk in schedule.spans[0]] == [9] * 11 + [1]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int, dict[str, Any]]:
    spans_s = draw(st.lists(st.floats(0, 2) | st.just(0.0) | st.floats(0, 1e-3), min_size=1, max_size=12))
    sub_buffers = draw(st.integers(1, 6))
    link = {
        "replicas": draw(st.integers(1, 4)),
        "bandwidth_bytes_per_s": draw(st.floats(1.0, 1e6)),
        "startup_s": draw(st.just(0.0) | st.floats(0, 0.5)),
        "buffer_bytes": draw(st.integers(sub_buffers, 500)),
        "sub_buffers": sub_buffers,
        "safety": draw(st.floats(0.01, 1)),
    }
    return spans_s, draw(st.integers(0, 600)), link


@given(cases())
@settings(max_examples=50)
def test_every_byte_of_every_copy_travels_once_and_in_order(case: tuple[list[float], int, dict[str, Any]]) -> None:
    spans_s, checkpoint_bytes, link = case
    schedule = schedule_chunks(spans_s, checkpoint_bytes, **link)
    assert len(schedule.spans) == len(spans_s)
    ahead = [(copy, offset) for copy in range(link["replicas"] - 1) for offset in range(checkpoint_bytes)]
    sent = [
        (chunk.copy, chunk.offset_bytes + byte)
        for span in schedule.spans
        for chunk in span
        for byte in range(chunk.size_bytes)
    ]
    assert sent == ahead


@given(cases())
@settings(max_examples=50)
def test_chunks_and_spans_are_never_overfull(case: tuple[list[float], int, dict[str, Any]]) -> None:
    spans_s, checkpoint_bytes, link = case
    schedule = schedule_chunks(spans_s, checkpoint_bytes, **link)
    assert all(1 <= c.size_bytes <= link["buffer_bytes"] // link["sub_buffers"] for s in schedule.spans for c in s)
    for span_s, chunks in zip(spans_s[:-1], schedule.spans[:-1], strict=True):
        assert busy_s(chunks, link) <= link["safety"] * span_s * (1 + 1e-9)


@given(cases())
@settings(max_examples=50)
def test_the_overrun_is_what_the_last_span_is_too_busy(case: tuple[list[float], int, dict[str, Any]]) -> None:
    spans_s, checkpoint_bytes, link = case
    schedule = schedule_chunks(spans_s, checkpoint_bytes, **link)
    beyond_s = busy_s(schedule.spans[-1], link) - link["safety"] * spans_s[-1]
    assert schedule.overrun_s == pytest.approx(max(0.0, beyond_s), abs=1e-9)
    assert schedule.overrun_s > 0 or beyond_s <= 1e-9


@given(cases())
@settings(max_examples=50)
def test_no_byte_waits_for_a_later_span_that_fits_into_an_earlier_one(
    case: tuple[list[float], int, dict[str, Any]],
) -> None:
    spans_s, checkpoint_bytes, link = case
    schedule = schedule_chunks(spans_s, checkpoint_bytes, **link)
    for span_s, (chunks, later) in zip(spans_s, pairwise(schedule.spans), strict=False):
        free_s = link["safety"] * span_s - busy_s(chunks, link)
        if later and chunks:
            one_more_byte_s = (
                1 / link["bandwidth_bytes_per_s"]
                if 0 < chunks[-1].size_bytes < link["buffer_bytes"] // link["sub_buffers"]
                and chunks[-1].copy == later[0].copy
                else link["startup_s"] + 1 / link["bandwidth_bytes_per_s"]
            )
            assert free_s < one_more_byte_s * (1 + 1e-6)


@given(cases(), st.floats(1.0, 10.0))
@settings(max_examples=50)
def test_a_faster_link_is_never_worse(case: tuple[list[float], int, dict[str, Any]], faster: float) -> None:
    spans_s, checkpoint_bytes, link = case
    slow = schedule_chunks(spans_s, checkpoint_bytes, **link)
    fast = schedule_chunks(
        spans_s, checkpoint_bytes, **{**link, "bandwidth_bytes_per_s": faster * link["bandwidth_bytes_per_s"]}
    )
    assert fast.overrun_s <= slow.overrun_s * (1 + 1e-9)
    sent_slow = sent_fast = 0
    for slow_span, fast_span in zip(slow.spans, fast.spans, strict=True):
        sent_slow += sum(chunk.size_bytes for chunk in slow_span)
        sent_fast += sum(chunk.size_bytes for chunk in fast_span)
        assert sent_fast >= sent_slow


@given(
    st.lists(st.floats(0, 1.7e308), min_size=1, max_size=5),
    st.integers(0, 10**13),
    st.floats(5e-324, 1.7e308),
    st.floats(0, 1.7e308),
    st.integers(4, 10**15),
    st.floats(5e-324, 1),
)
@settings(max_examples=40)
def test_any_number_ends(
    spans_s: list[float], checkpoint_bytes: int, bandwidth: float, startup_s: float, buffer_bytes: int, safety: float
) -> None:
    link = {
        "replicas": 2,
        "bandwidth_bytes_per_s": bandwidth,
        "startup_s": startup_s,
        "buffer_bytes": max(buffer_bytes, 4 * checkpoint_bytes // 300),
        "sub_buffers": 4,
        "safety": safety,
    }
    schedule = schedule_chunks(spans_s, checkpoint_bytes, **link)
    assert sum(chunk.size_bytes for span in schedule.spans for chunk in span) == checkpoint_bytes
    assert schedule.overrun_s >= 0


def test_the_largest_model_in_small_chunks_over_many_spans() -> None:
    schedule = schedule_chunks([0.005] * 2000, 1200 * 1000 * MB, **{**PAPER, "sub_buffers": 16})
    assert sum(chunk.size_bytes for span in schedule.spans for chunk in span) == 1200 * 1000 * MB
    assert schedule.overrun_s > 0


def test_more_chunks_than_can_be_meant_are_refused() -> None:
    link = {**PAPER, "buffer_bytes": 4000}
    with pytest.raises(ConfigurationError, match=r"would be 1200000000 chunks, at most 1000000.* larger buffer"):
        schedule_chunks([1e6], 1200 * 1000 * MB, **link)
    assert len(schedule_chunks([0.0], 1000 * MAX_CHUNKS // 20, **link).spans[0]) == MAX_CHUNKS // 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 0}, r"replicas must be 1 or more .* got 0: use 1"),
        ({"bandwidth_bytes_per_s": 0.0}, r"bandwidth_bytes_per_s must be .* got 0.0: measure"),
        ({"bandwidth_bytes_per_s": -1.0}, r"bandwidth_bytes_per_s .* got -1.0"),
        ({"bandwidth_bytes_per_s": math.nan}, r"bandwidth_bytes_per_s .* got nan"),
        ({"bandwidth_bytes_per_s": math.inf}, r"bandwidth_bytes_per_s .* got inf"),
        ({"startup_s": -1e-6}, r"startup_s must be .* got -1e-06: measure"),
        ({"startup_s": math.nan}, r"startup_s .* got nan"),
        ({"buffer_bytes": 3}, r"buffer_bytes must be at least 1 byte for each of the 4 .* got 3: use a larger"),
        ({"buffer_bytes": 0}, r"buffer_bytes .* got 0"),
        ({"sub_buffers": 0}, r"sub_buffers must be 1 or more, got 0: use"),
        ({"safety": 0.0}, r"safety must be above 0 and at most 1, got 0.0: use"),
        ({"safety": 1.01}, r"safety .* got 1.01"),
        ({"safety": math.nan}, r"safety .* got nan"),
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        schedule_chunks([0.1], 1000, **{**PAPER, **change})


@pytest.mark.parametrize(
    ("spans_s", "checkpoint_bytes", "message"),
    [
        ([], 1000, "at least 1 idle span, got none"),
        ([0.1, -0.1], 1000, "span 1 is -0.1 s: profile"),
        ([math.nan], 1000, "span 0 is nan s"),
        ([math.inf], 1000, "span 0 is inf s"),
        ([0.1], -1, "checkpoint_bytes must be 0 or more, got -1"),
    ],
)
def test_impossible_spans_and_checkpoints_are_refused(
    spans_s: list[float], checkpoint_bytes: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        schedule_chunks(spans_s, checkpoint_bytes, **PAPER)
