"""The profiler: traces of iterations, and a pace page that follows them."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.core.idle_spans import IterationTrace
from lightning_gemini.dataplane import profiler as profiler_module
from lightning_gemini.dataplane.pace_page import PacePage
from lightning_gemini.dataplane.profiler import Profiler

CPU = torch.device("cpu")


def profiled() -> tuple[Profiler, PacePage]:
    page = PacePage.private()
    return Profiler(page, CPU), page


def where(page: PacePage) -> tuple[int, bool]:
    return page.span().index, page.span().open


def finish(profiler: Profiler, label: int = 0) -> IterationTrace:
    """Ends the iteration with a step."""
    profiler.step_began()
    found = profiler.begin_iteration(label)
    assert found is not None
    return found[1]


def busy_s(trace: IterationTrace) -> float:
    """Length of the union of all collectives, by another method than the one under test."""
    edges = sorted(
        [(collective.start_s, 1) for collective in trace.collectives]
        + [(collective.end_s, -1) for collective in trace.collectives]
    )
    total = depth = 0.0
    for (at, change), (after, _) in itertools.pairwise(edges):
        depth += change
        total += (after - at) if depth else 0.0
    return total


def test_a_trace_has_what_was_issued() -> None:
    profiler, _ = profiled()
    before = time.monotonic()
    assert profiler.begin_iteration(7) is None
    profiler.ended(profiler.began("all_gather", 100))
    profiler.ended(profiler.began("reduce_scatter", 200))
    profiler.step_began()
    profiler.ended(profiler.began("all_reduce", 4))
    found = profiler.begin_iteration(8)
    assert found is not None
    label, trace = found
    assert (label, trace.deadline) == (7, 2)
    assert trace.shape == (("all_gather", 100), ("reduce_scatter", 200), ("all_reduce", 4))
    assert before <= trace.began_s < trace.ended_s <= time.monotonic()


def test_iterations_follow_one_another_without_a_gap() -> None:
    profiler, _ = profiled()
    profiler.begin_iteration()
    first, second = finish(profiler), finish(profiler)
    assert second.began_s == pytest.approx(first.ended_s, abs=1e-9)


def test_only_the_first_step_hook_of_an_iteration_counts() -> None:
    """ZeRO-3 calls the optimizer once for each sub-group."""
    profiler, _ = profiled()
    profiler.begin_iteration()
    profiler.step_began()
    profiler.ended(profiler.began("all_gather", 1))
    assert finish(profiler).deadline == 0


def test_an_iteration_without_a_step_has_no_trace() -> None:
    profiler, _ = profiled()
    profiler.begin_iteration(1)
    assert profiler.begin_iteration(2) is None
    profiler.step_began()
    found = profiler.begin_iteration(3)
    assert found is not None
    assert found[0] == 2


def test_the_page_is_open_exactly_when_nothing_is_in_flight() -> None:
    profiler, page = profiled()
    profiler.begin_iteration()
    assert where(page) == (0, True)
    first = profiler.began("all_gather", 1)
    assert where(page) == (0, False)
    second = profiler.began("all_gather", 1)
    profiler.ended(first)
    assert where(page) == (0, False), "the second one is still in flight"
    profiler.ended(second)
    assert where(page) == (2, True)
    profiler.ended(profiler.began("all_gather", 1))
    assert where(page) == (3, True)
    profiler.begin_iteration()
    assert where(page) == (0, True)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_page_and_trace_agree_with_any_order_of_events(events: list[tuple[bool, int]]) -> None:
    profiler, page = profiled()
    profiler.begin_iteration()
    flying: list[int] = []
    issued = 0
    for begins, choice in events:
        if begins or not flying:
            flying.append(profiler.began("all_gather", choice))
            issued += 1
        else:
            profiler.ended(flying.pop(choice % len(flying)))
        assert page.span().open == (not flying)
        if not flying:
            assert page.span().index == issued
    trace = finish(profiler)
    assert len(trace.collectives) == issued
    assert all(
        trace.began_s <= collective.start_s <= collective.end_s <= trace.ended_s for collective in trace.collectives
    )
    assert sum(trace.idle_spans_s()) + busy_s(trace) == pytest.approx(trace.duration_s, abs=1e-9)


def test_one_that_never_completes_ends_with_its_iteration() -> None:
    profiler, page = profiled()
    profiler.begin_iteration()
    lost = profiler.began("all_gather", 1)
    trace = finish(profiler)
    assert trace.collectives[0].end_s == trace.ended_s
    assert where(page) == (0, True)
    current = profiler.began("all_gather", 1)
    profiler.ended(lost)  # later than that it may complete: it belongs to nothing any more
    assert where(page) == (0, False)
    profiler.ended(current)
    profiler.ended(current)
    assert where(page) == (1, True)


def test_what_is_issued_before_the_first_iteration_is_not_recorded() -> None:
    profiler, page = profiled()
    token = profiler.began("broadcast", 1)
    profiler.begin_iteration()
    profiler.ended(token)
    assert where(page) == (0, True)
    assert not finish(profiler).collectives


def test_an_iteration_without_end_is_not_recorded_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler_module, "MAX_COLLECTIVES", 5)
    profiler, page = profiled()
    profiler.begin_iteration()
    for _ in range(8):
        profiler.ended(profiler.began("all_reduce", 1))
    assert where(page) == (5, True)
    profiler.step_began()
    assert profiler.begin_iteration() is None
    assert not finish(profiler).collectives


def test_its_own_fault_is_logged_once_and_ends_the_recording(caplog: pytest.LogCaptureFixture) -> None:
    profiler, page = profiled()
    profiler.begin_iteration()
    token = profiler.began("all_gather", 1)
    page.close_span = page.open_span = None  # type: ignore[method-assign,assignment]
    with caplog.at_level(logging.WARNING):
        profiler.ended(token)
        assert profiler.begin_iteration() is None
        profiler.ended(profiler.began("all_gather", 1))
        profiler.step_began()
    assert not profiler.recording
    assert len(caplog.records) == 1
    assert page.rushing, "what waits for a span must not wait for ever"


def test_a_page_that_is_gone_does_not_reach_training() -> None:
    profiler, page = profiled()
    profiler.begin_iteration()
    page.words.release()
    profiler.ended(profiler.began("all_gather", 1))
    assert not profiler.recording


def test_closed_it_records_nothing_and_lets_everything_go() -> None:
    profiler, page = profiled()
    profiler.begin_iteration()
    token = profiler.began("all_gather", 1)
    profiler.close()
    profiler.close()
    profiler.ended(token)
    assert profiler.begin_iteration() is None
    assert page.rushing


def test_completions_may_come_on_any_thread(seed: int) -> None:
    """Eight threads complete what the training thread issues."""
    profiler, page = profiled()
    draw = random.Random(seed)
    for _ in range(20):
        profiler.begin_iteration()
        tokens = [profiler.began("all_gather", 1) for _ in range(40)]
        draw.shuffle(tokens)
        threads = [threading.Thread(target=_end_all, args=(profiler, tokens[part::8])) for part in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert where(page) == (40, True)
        trace = finish(profiler)
        assert all(
            trace.began_s <= collective.start_s < collective.end_s <= trace.ended_s for collective in trace.collectives
        )
        assert sum(trace.idle_spans_s()) + busy_s(trace) == pytest.approx(trace.duration_s, abs=1e-9)


def _end_all(profiler: Profiler, tokens: list[int]) -> None:
    for token in tokens:
        profiler.ended(token)


def test_new_shapes_every_iteration_need_no_more_memory(seed: int) -> None:
    profiler, _ = profiled()
    draw = random.Random(seed)
    profiler.begin_iteration()
    _train(profiler, draw, 20)
    tracemalloc.start()
    try:
        _train(profiler, draw, 20)
        after_few = tracemalloc.get_traced_memory()[0]
        _train(profiler, draw, 200)
        after_many = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after_many - after_few < 50_000


def _train(profiler: Profiler, draw: random.Random, iterations: int) -> None:
    for _ in range(iterations):
        for _ in range(draw.randrange(50)):
            profiler.ended(profiler.began(f"name{draw.random()}", draw.randrange(10**9)))
        finish(profiler)
