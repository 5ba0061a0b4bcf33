from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.core.frequency import choose_every
from lightning_gemini.core.schedule import Schedule, schedule_chunks
from lightning_gemini.errors import ConfigurationError

LINK: dict[str, Any] = {
    "replicas": 2,
    "bandwidth_bytes_per_s": 1000.0,
    "startup_s": 0.0,
    "buffer_bytes": 40,
    "sub_buffers": 4,
    "safety": 1.0,
}
SPANS_S = (0.05, 0.02, 0.03)
"""70 bytes before the step, 100 bytes an iteration."""


@pytest.mark.parametrize(
    ("checkpoint_bytes", "every", "overhead"),
    [
        (0, 1, 0.0),
        (70, 1, 0.0),
        (80, 1, 0.01),  # 10 bytes too many are 10 ms of an iteration of 1 s
        (81, 2, 0.0),
        (170, 2, 0.0),
        (190, 2, 0.01),
        (191, 3, 0.0),
        (1070 + 110, 11, 0.01),
        (1070 + 111, 12, 0.001 * 11 / 12),
    ],
)
def test_the_smallest_number_of_iterations_within_the_budget(
    checkpoint_bytes: int, every: int, overhead: float
) -> None:
    cadence = choose_every(SPANS_S, 1, 1.0, checkpoint_bytes, budget=0.01 + 1e-9, limit=100, **LINK)
    assert cadence.every == every
    assert cadence.overhead == pytest.approx(overhead, abs=1e-9)
    assert len(cadence.schedule.spans) == 3 * (every - 1) + 2


def test_a_version_has_all_spans_but_those_after_its_last_step() -> None:
    cadence = choose_every(SPANS_S, 1, 1.0, 170, budget=0.0, limit=10, **LINK)
    per_span = [sum(chunk.size_bytes for chunk in span) for span in cadence.schedule.spans]
    assert per_span == [50, 20, 30, 50, 20]


def test_the_limit_is_taken_when_nothing_is_cheap_enough() -> None:
    cadence = choose_every(SPANS_S, 1, 1.0, 10_000, budget=0.01, limit=7, **LINK)
    assert cadence.every == 7
    assert cadence.overhead == pytest.approx((10_000 - 670) / 1000 / 7)


def test_without_idle_time_the_cost_is_spread() -> None:
    cadence = choose_every([0.0], 0, 1.0, 100, budget=0.01, limit=1000, **LINK)
    assert (cadence.every, cadence.overhead) == (10, pytest.approx(0.01))
    assert cadence.schedule.spans[:-1] == ((),) * 9


def test_many_iterations_of_many_spans() -> None:
    cadence = choose_every([1e-4] * 200, 199, 1.0, 10**6, budget=0.0, limit=1000, **{**LINK, "startup_s": 1e-4})
    assert (cadence.every, len(cadence.schedule.spans)) == (1000, 200_000)


@given(
    st.lists(st.floats(0, 0.2), min_size=1, max_size=6),
    st.data(),
    st.integers(0, 2000),
    st.floats(0, 0.2),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.003, 0.05]),
    st.integers(1, 3),
)
@settings(max_examples=50)
def test_as_found_by_trying_every_number(
    spans_s: list[float],
    data: st.DataObject,
    checkpoint_bytes: int,
    budget: float,
    limit: int,
    startup_s: float,
    replicas: int,
) -> None:
    deadline = data.draw(st.integers(0, len(spans_s) - 1))
    link = {**LINK, "startup_s": startup_s, "replicas": replicas}

    def tried(every: int) -> tuple[float, Schedule]:
        spans = spans_s * (every - 1) + spans_s[: deadline + 1]
        schedule = schedule_chunks(spans, checkpoint_bytes, **link)
        return schedule.overrun_s / (every * 0.5), schedule

    expected = next((n for n in range(1, limit + 1) if tried(n)[0] <= budget), limit)
    cadence = choose_every(spans_s, deadline, 0.5, checkpoint_bytes, budget=budget, limit=limit, **link)
    assert (cadence.every, (cadence.overhead, cadence.schedule)) == (expected, tried(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deadline": 3}, "one of the 3 idle spans, from 0, got 3"),
        ({"deadline": -1}, "got -1"),
        ({"profile_means_s": (), "deadline": 0}, "at least 1 idle span"),
        ({"profile_means_s": (0.1, math.nan)}, "span 1 is nan s"),
        ({"iteration_s": 0.0}, "iteration_s must be finite and above 0, got 0.0"),
        ({"iteration_s": math.nan}, "got nan"),
        ({"budget": -0.1}, "budget must be 0 or more, got -0.1"),
        ({"budget": math.nan}, "got nan"),
        ({"limit": 0}, "limit must be 1 iteration per version or more, got 0"),
        ({"safety": 2.0}, "safety must be"),
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, Any], message: str) -> None:
    numbers = {
        "profile_means_s": SPANS_S,
        "deadline": 1,
        "iteration_s": 1.0,
        "checkpoint_bytes": 10,
        "budget": 0.01,
        "limit": 5,
        **LINK,
    }
    with pytest.raises(ConfigurationError, match=message):
        choose_every(**{**numbers, **change})
