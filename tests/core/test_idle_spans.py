from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.core.idle_spans import Collective, IdleSpan, IterationTrace, average


def trace(*times_s: tuple[float, float], began_s: float = 0.0, ended_s: float = 10.0, size: int = 8) -> IterationTrace:
    """An iteration with a collective for each pair of start and end."""
    collectives = tuple(Collective("all_gather", size, start, end) for start, end in times_s)
    return IterationTrace(began_s, ended_s, len(collectives), collectives)


@pytest.mark.parametrize(
    ("iteration", "spans_s"),
    [
        (trace(), (10.0,)),
        (trace((1, 3), (6, 9)), (1, 3, 1)),
        (trace((0, 3), (3, 10)), (0, 0, 0)),
        (trace((1, 5), (2, 3), (7, 8)), (1, 0, 2, 2)),  # the second runs inside the first
        (trace((1, 5), (4, 6)), (1, 0, 4)),
        (trace((1, 5), (3, 12)), (1, 0, 0)),  # the last is complete only in the next iteration
        (trace((3, 4), (2, 5)), (3, 0, 5)),  # on another stream, number 1 started before number 0
        (trace((101, 102), began_s=100.0, ended_s=104.0), (1, 2)),
    ],
)
def test_a_span_ends_where_the_next_collective_starts(iteration: IterationTrace, spans_s: tuple[float, ...]) -> None:
    assert iteration.idle_spans_s() == spans_s


@pytest.mark.parametrize(
    ("iteration", "periods_s"),
    [
        (trace(), (10.0,)),
        (trace((1, 3), (6, 9)), (3, 6, 1)),
        (trace((1, 5), (2, 3), (7, 8)), (5, 0, 3, 2)),
        (trace((1, 5), (4, 6)), (5, 1, 4)),
        (trace((1, 5), (3, 12)), (5, 7, 0)),
        (trace((101, 102), began_s=100.0, ended_s=104.0), (2, 2)),
    ],
)
def test_a_period_lasts_from_the_beginning_of_a_span_to_that_of_the_next(
    iteration: IterationTrace, periods_s: tuple[float, ...]
) -> None:
    assert iteration.periods_s() == periods_s


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=10), st.integers(0, 30))
def test_idle_and_busy_time_make_up_the_iteration(lengths: list[tuple[int, int]], after: int) -> None:
    """Checked on a grid of whole seconds: a second is idle if no collective covers it."""
    starts = sorted(start for start, _ in lengths)
    times = [(start, start + length) for start, (_, length) in zip(starts, lengths, strict=True)]
    ended = max((end for _, end in times), default=0) + after
    covered = {second for start, end in times for second in range(start, end)}
    iteration = trace(*times, ended_s=ended)
    assert sum(iteration.idle_spans_s()) == ended - len(covered)
    assert len(iteration.idle_spans_s()) == len(times) + 1
    assert sum(iteration.periods_s()) == ended


def test_the_shape_is_names_and_bytes_in_order() -> None:
    collectives = (Collective("all_reduce", 4, 1, 2), Collective("broadcast", 16, 3, 4))
    assert IterationTrace(0, 5, 1, collectives).shape == (("all_reduce", 4), ("broadcast", 16))


def test_an_average_has_mean_and_spread_of_every_span() -> None:
    profile = average([trace((1, 3)), trace((2, 3), ended_s=9), trace((6, 7), began_s=3, ended_s=14)])
    assert profile.shape == (("all_gather", 8),)
    assert profile.means_s == (2.0, 20 / 3)
    assert profile.periods_s == (10 / 3, 20 / 3)
    assert [span.std_s for span in profile.spans] == [1.0, pytest.approx(statistics.stdev([7, 6, 7]))]
    assert profile.idle_s == pytest.approx(2 + 20 / 3)
    assert profile.spread == pytest.approx((1 + statistics.stdev([7, 6, 7])) / (2 + 20 / 3))
    assert (profile.iteration_s, profile.iterations, profile.deadline) == (10.0, 3, 1)


def test_a_single_iteration_has_no_spread() -> None:
    profile = average([trace((0, 10))])
    assert profile.spans == (IdleSpan(0.0, 0.0), IdleSpan(0.0, 0.0))
    assert profile.spread == 0.0


def test_iterations_of_other_shape_or_deadline_are_not_averaged() -> None:
    first = trace((1, 2))
    for other in (trace((1, 2), (3, 4)), trace((1, 2), size=9), IterationTrace(0, 10, 0, first.collectives)):
        with pytest.raises(ValueError, match=r"number 0 has 1 collectives of 8 bytes, 1 of them .* number 2 has"):
            average([first, first, other])
    with pytest.raises(ValueError, match="at least 1 iteration, got none"):
        average([])
