"""How much of the idle spans a plan uses: no more than it needs, as the middle is where no rank is disturbed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.callbacks.traffic_plan import Plan, Planner
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.core.frequency import choose_every
from lightning_gemini.core.idle_spans import Collective, IterationTrace, average
from lightning_gemini.core.scheme import Scheme
from lightning_gemini.dataplane.link_speed import LinkSpeed
from lightning_gemini.dataplane.pace_page import PacePage

BANDWIDTH = 1e7
COLLECTIVE_S = 0.01


def planner(**settings: Any) -> Planner:
    return Planner(CheckpointConfig(**{"buffer_bytes": 65536, **settings}), 2)


def plan_for(shard_bytes: int, spans_s: list[float], **settings: Any) -> Plan:
    collectives, at_s = [], 0.0
    for span_s in spans_s[:-1]:
        at_s += span_s
        collectives.append(Collective("all_gather", 1000, at_s, at_s + COLLECTIVE_S))
        at_s += COLLECTIVE_S
    trace = IterationTrace(0.0, at_s + spans_s[-1], len(collectives), tuple(collectives))
    found = planner(**settings).plan(Scheme.INTERLEAVED, average([trace]), LinkSpeed(BANDWIDTH, 1e-5), shard_bytes)
    assert found is not None
    return found


def test_a_small_checkpoint_uses_the_middle_of_every_span() -> None:
    """Half of the idle time, and a little more for spans that are shorter today."""
    plan, page = plan_for(1_000_000, [0.05, 0.1, 0.05]), PacePage.private()
    assert (plan.cadence.every, plan.cadence.overhead) == (1, 0.0)
    assert 0.5 < plan.safety < 0.7
    planner().apply(page, Scheme.INTERLEAVED, plan)
    told = page.plan()
    assert told is not None
    used_s = [length_ns / 1e9 for length_ns in told.usable_ns]
    lead_s = [length_s * told.lead_ppm / 1e6 for length_s in used_s]
    assert used_s == pytest.approx([0.05 * plan.safety, 0.1 * plan.safety, 0.05 * plan.safety], abs=2e-6)
    assert [lead + used + lead for lead, used in zip(lead_s, used_s, strict=True)] == pytest.approx(
        [0.05, 0.1, 0.05], abs=1e-5
    )


def test_a_tiny_one_leaves_enough_of_a_span_to_be_found() -> None:
    assert plan_for(10, [0.05, 0.1, 0.05]).safety == pytest.approx(0.4, abs=0.02)
    assert plan_for(10, [0.05, 0.1, 0.05], safety=0.3).safety == pytest.approx(0.3)


def test_one_that_needs_all_of_it_gets_what_is_safe() -> None:
    plan = plan_for(1_500_000, [0.05, 0.1, 0.05], overhead_budget=1e-9)
    assert plan.safety == 0.8
    assert plan.cadence.every == 1


def test_one_that_fits_nowhere_gets_what_is_safe() -> None:
    plan = plan_for(20_000_000, [0.05, 0.1, 0.05], overhead_budget=1e9)
    assert plan.safety == 0.8
    assert plan.cadence.overhead > 0.0


@given(
    spans_s=st.lists(st.floats(0.0, 0.2), min_size=2, max_size=8).filter(lambda spans: math.fsum(spans) > 0.01),
    shard_bytes=st.integers(1, 5_000_000),
    safety=st.floats(0.1, 1.0),
    budget=st.sampled_from([1e-9, 0.01, 0.5]),
)
def test_using_less_never_makes_versions_rarer_or_dearer(
    spans_s: list[float], shard_bytes: int, safety: float, budget: float
) -> None:
    plan = plan_for(shard_bytes, spans_s, safety=safety, overhead_budget=budget)
    most = choose_every(
        plan.profile.means_s,
        plan.profile.deadline,
        plan.profile.iteration_s,
        shard_bytes,
        budget=budget,
        limit=1000,
        replicas=2,
        bandwidth_bytes_per_s=plan.link.bandwidth_bytes_per_s,
        startup_s=plan.link.startup_s,
        buffer_bytes=plan.chunking.window_bytes,
        sub_buffers=plan.chunking.sub_buffers,
        safety=safety,
    )
    assert 0.0 < plan.safety <= safety
    assert (plan.cadence.every, plan.cadence.overhead) == (most.every, most.overhead)
