"""Points in time on a CUDA device, and the pace page's span words written by the device itself.

The host runs ahead of the device, so that only the device knows when a collective of NCCL begins and ends. Nothing here
waits for it, except :meth:`DeviceMarks.close`, and that not for long.
"""

from __future__ import annotations

import logging

import torch

from lightning_gemini.dataplane.pace_page import MAX_SPANS, PacePage
from lightning_gemini.dataplane.pinned_memory import PinnedMemory

log = logging.getLogger(__name__)

_MS_PER_S = 1e3


# -- CUDA only: nothing of this runs on the CPU, as with the device copies of a snapshot -------------------------------


class DeviceMarks:
    """Marks are events in the caller's current stream; a stream of its own follows them, and writes the page.

    That stream waits for every mark in the order in which the host made them. So it writes "span i is open" when all
    collectives before number i are over, and "closed" when number i begins. Where they overlap on the device the span
    opens only to be closed at once; its usable length is 0.

    Args:
        page: Its span words follow the device: a DMA of 16 prepared bytes, which leaves it to the reader to take the
            time (the word for it is 0). ``None``: only times are wanted.
        device: The training device.
    """

    def __init__(self, page: PacePage | None, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._free: list[torch.cuda.Event] = []
        self._index = 0
        self._pinned = PinnedMemory(device)
        self._target = None if page is None else self._pinned_words(page)
        self._table = _span_table().to(device) if self._target is not None else torch.empty(0)

    def mark(self) -> torch.cuda.Event:
        """The device gets here after everything that the calling thread has enqueued in its current stream."""
        if torch.cuda.is_current_stream_capturing():
            # An event would become part of the graph, and our stream an unfinished branch of it.
            raise RuntimeError("a CUDA graph is being captured, and what runs inside one cannot be profiled")
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(event)
        return event

    def close_span(self, mark: torch.cuda.Event) -> None:
        """The network is in use from that mark on."""
        self._write(2 * self._index)

    def open_span(self, index: int, mark: torch.cuda.Event) -> None:
        """Span ``index`` begins at that mark."""
        self._index = min(index, MAX_SPANS)  # no plan has that many: there is no room in the last one
        self._write(2 * self._index + 1)

    def fence(self) -> torch.cuda.Event:
        """An event behind all marks so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def passed(self, fence: torch.cuda.Event) -> bool:
        """Whether the device is behind it; never waits."""
        return bool(fence.query())

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        """Device time between two marks behind which the device is; 0.5 µs exact within an iteration."""
        return float(earlier.elapsed_time(later)) / _MS_PER_S

    def recycle(self, marks: list[torch.cuda.Event]) -> None:
        """These are needed no more, and may mark other points."""
        self._free.extend(marks)

    def close(self) -> None:
        """Write no more; idempotent. A device that hangs is given some seconds, then the page stays pinned."""
        self._target = None
        self._pinned.close(self._stream)

    def _write(self, row: int) -> None:
        if self._target is not None:
            with torch.cuda.stream(self._stream):
                self._target.copy_(self._table[row], non_blocking=True)

    def _pinned_words(self, page: PacePage) -> torch.Tensor | None:
        """The page's span words as int64 that the device can write; ``None`` if CUDA does not take it.

        Unpinned it must not be used: such a copy waits for the device on the host.
        """
        words = torch.frombuffer(page.span_words, dtype=torch.int64)
        if self._pinned.pin(words):
            return words
        log.warning("the device cannot write the pace page: checkpoints are sent without regard to training")
        return None


def _span_table() -> torch.Tensor:
    """Row 2i: span and began word for "span i is over"; row 2i + 1: for "it is open"."""
    rows = [[PacePage.encode_span(index, is_open), 0] for index in range(MAX_SPANS + 1) for is_open in (False, True)]
    return torch.tensor(rows, dtype=torch.int64)
