"""What a CUDA device writes into the pace page; the second test needs such a device."""

from __future__ import annotations

import pytest
import torch

from lightning_gemini.dataplane import device_marks
from lightning_gemini.dataplane.pace_page import MAX_SPANS, PacePage, Span
from lightning_gemini.dataplane.profiler import Profiler


def test_the_prepared_words_say_what_a_reader_of_the_page_expects() -> None:
    page, table = PacePage.private(), device_marks._span_table()
    words = torch.frombuffer(page.span_words, dtype=torch.int64)
    for index in (0, 1, 300, MAX_SPANS):
        for is_open in (False, True):
            words.copy_(table[2 * index + is_open])
            assert page.span() == Span(index, 0, is_open)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_page_and_trace_follow_the_device_and_not_the_host() -> None:
    page, device = PacePage.private(), torch.device("cuda", torch.cuda.current_device())
    profiler = Profiler(page, device)
    profiler.begin_iteration(1)
    torch.cuda.synchronize()
    assert (page.span().index, page.span().open) == (0, True)
    torch.cuda._sleep(300_000_000)  # cycles: about 0.2 s
    token = profiler.began("all_gather", 1)
    assert page.span().open, "the device has not got there yet"
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # as NCCL's future calls back
        torch.cuda._sleep(300_000_000)
        profiler.ended(token)
    torch.cuda.current_stream().wait_stream(beside)
    profiler.step_began()
    assert profiler.begin_iteration(2) is None, "the device is not through"
    torch.cuda.synchronize()
    profiler.step_began()
    found = profiler.begin_iteration(3)
    assert found is not None
    label, trace = found
    (collective,) = trace.collectives
    assert label == 1
    assert trace.began_s + 0.01 < collective.start_s < collective.end_s - 0.01
    assert sum(trace.idle_spans_s()) + collective.end_s - collective.start_s == pytest.approx(
        trace.duration_s, abs=1e-4
    )
    profiler.close()
