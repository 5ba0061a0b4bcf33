"""Records when training uses the network, and tells the pace page when it does not (GEMINI, SOSP '23, section 5)."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import Any

import torch

from lightning_gemini.core.idle_spans import Collective, IterationTrace
from lightning_gemini.dataplane.device_marks import DeviceMarks
from lightning_gemini.dataplane.marks import HostMarks, Marks
from lightning_gemini.dataplane.pace_page import PacePage

log = logging.getLogger(__name__)

MAX_COLLECTIVES = 1 << 16
"""An iteration with more gets no trace: validation and the like, which no optimizer step ends."""

_MAX_PENDING = 4
_NOBODY = -1
_TOKENS = 1 << 32


class _Iteration:
    """What is known of an iteration so far; collectives in the order of issue."""

    __slots__ = ("began", "deadline", "ended", "ends", "fence", "label", "names", "number", "sizes", "starts")

    def __init__(self, number: int, label: int, began: Any) -> None:
        self.number, self.label, self.began = number, label, began
        self.ended: Any = None
        self.fence: Any = None
        self.deadline: int | None = None
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.starts: list[Any] = []
        self.ends: list[Any] = []


class Profiler:
    """A :class:`~lightning_gemini.dataplane.collective_tap.CollectiveListener` that turns collectives into traces.

    It is always on: recording a collective takes microseconds, and nothing here ever waits. Methods may be called on
    any thread. An error of its own is logged once and ends the recording, never the training; then everything that
    waits for a span may go at once.

    Args:
        page: Its span words follow the training; ``None``: only traces are wanted.
        device: The training device; on CUDA all times are those of the device.
    """

    def __init__(self, page: PacePage | None, device: torch.device) -> None:
        self._page = page
        self._marks: Marks = DeviceMarks(page, device) if device.type == "cuda" else HostMarks(page)
        self._lock = threading.Lock()
        self._current: _Iteration | None = None
        self._pending: deque[_Iteration] = deque()
        self._in_flight = 0
        self._iterations = 0
        self._clock_s = 0.0  # when the oldest iteration without a trace began; on CUDA device time is added up
        self.recording = True

    # -- of the collectives ----------------------------------------------------------------------------------------

    def began(self, name: str, size_bytes: int) -> int:
        """A collective is about to be issued: no span is open while one is in flight."""
        if not self.recording:
            return _NOBODY
        try:
            return self._began(name, size_bytes)
        except Exception as error:
            self._give_up(error)
            return _NOBODY

    def ended(self, token: int) -> None:
        """A collective is complete, or has failed: the next span opens when no other is in flight."""
        if not self.recording or token == _NOBODY:
            return
        try:
            self._ended(token)
        except Exception as error:
            self._give_up(error)

    def _began(self, name: str, size_bytes: int) -> int:
        with self._lock:
            iteration = self._current
            if iteration is None or len(iteration.names) >= MAX_COLLECTIVES:
                return _NOBODY
            iteration.names.append(name)
            iteration.sizes.append(size_bytes)
            iteration.ends.append(None)
            mark = self._marks.mark()
            iteration.starts.append(mark)
            if not self._in_flight:
                self._marks.close_span(mark)
            self._in_flight += 1
            return iteration.number * _TOKENS + len(iteration.names) - 1

    def _ended(self, token: int) -> None:
        mark = self._marks.mark()
        number, index = divmod(token, _TOKENS)
        with self._lock:
            iteration = self._current
            # One that was still in flight when its iteration ended counts as ended then.
            if iteration is None or iteration.number != number or iteration.ends[index] is not None:
                return
            iteration.ends[index] = mark
            self._in_flight -= 1
            if not self._in_flight:
                self._marks.open_span(len(iteration.names), mark)

    # -- of the training -------------------------------------------------------------------------------------------

    def begin_iteration(self, label: int = 0) -> tuple[int, IterationTrace] | None:
        """The batch after an optimizer step begins: this ends an iteration, and begins one.

        Args:
            label: Comes back with the trace of the iteration that begins here.

        Returns:
            Label and trace of the oldest iteration that was not returned yet: on the CPU the one that ends here, on
            CUDA an older one that the device has finished. ``None``: there is none yet, or it had no step.
        """
        if not self.recording:
            return None
        try:
            return self._begin_iteration(label)
        except Exception as error:
            self._give_up(error)
            return None

    def step_began(self) -> None:
        """The optimizer's step begins: what must be committed by now had only the spans so far."""
        if not self.recording:
            return
        with self._lock:
            if self._current is not None and self._current.deadline is None:
                self._current.deadline = len(self._current.names)

    def close(self) -> None:
        """Record nothing more, and leave a span open; idempotent."""
        if self.recording:
            self.recording = False
            self._let_everything_go()
        self._marks.close()

    def _begin_iteration(self, label: int) -> tuple[int, IterationTrace] | None:
        with self._lock:
            mark = self._marks.mark()
            if self._current is None:
                self._clock_s = time.monotonic()
            finished, self._iterations = self._current, self._iterations + 1
            self._current = _Iteration(self._iterations, label, mark)
            self._in_flight = 0
            self._marks.open_span(0, mark)
        if finished is not None:
            finished.ended, finished.fence = mark, self._marks.fence()
            self._pending.append(finished)
        return self._next_trace()

    def _next_trace(self) -> tuple[int, IterationTrace] | None:
        found = None
        while self._pending and found is None and self._marks.passed(self._pending[0].fence):
            found = self._trace(self._pending.popleft())
        while len(self._pending) > _MAX_PENDING:  # the device hangs
            self._pending.popleft()
        return found

    def _trace(self, iteration: _Iteration) -> tuple[int, IterationTrace] | None:
        seconds, first = self._marks.seconds, iteration.began
        began_s = self._clock_s
        ended_s = self._clock_s = began_s + seconds(first, iteration.ended)
        if iteration.deadline is None or len(iteration.names) >= MAX_COLLECTIVES:
            return None
        collectives = []
        for name, size, start, end in zip(
            iteration.names, iteration.sizes, iteration.starts, iteration.ends, strict=True
        ):
            start_s = min(began_s + seconds(first, start), ended_s)
            end_s = ended_s if end is None else min(began_s + seconds(first, end), ended_s)
            collectives.append(Collective(name, size, start_s, end_s))
        self._marks.recycle([*iteration.starts, *(end for end in iteration.ends if end is not None), first])
        return iteration.label, IterationTrace(began_s, ended_s, iteration.deadline, tuple(collectives))

    # -- of its own troubles ---------------------------------------------------------------------------------------

    def _give_up(self, error: Exception) -> None:
        if self.recording:
            self.recording = False
            log.warning("training's use of the network is no longer profiled (%s)", error, exc_info=error)
            self._let_everything_go()

    def _let_everything_go(self) -> None:
        """Nobody tells from here on whether the network is in use."""
        if self._page is not None:
            with contextlib.suppress(Exception):  # the page itself may be the trouble
                self._page.rush(True)
