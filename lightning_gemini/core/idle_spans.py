"""When training leaves the network alone (GEMINI, SOSP '23, section 5: profiling).

An iteration that issues n collectives has n + 1 idle spans. Span i lies between the end of all collectives before
number i and the start of number i; the last one ends with the iteration. Collectives that overlap leave a span of
length 0 between them, so that spans of two iterations of the same shape correspond by their index. A span's period is
the time from its beginning to that of the next one: it, and the collective behind it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Collective", "IdleProfile", "IdleSpan", "IterationTrace", "average"]

Shape = tuple[tuple[str, int], ...]
"""Name and bytes of every collective, in the order of issue."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of the training.

    Attributes:
        name: What it does, such as ``all_gather_into_tensor``.
        size_bytes: Bytes that this rank was asked to move.
        start_s: When it started, on the clock of its iteration.
        end_s: When it was complete, which for an asynchronous one is later than the return of the call.
    """

    name: str
    size_bytes: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class IterationTrace:
    """One iteration, from the batch after an optimizer step to the batch after the next one.

    Attributes:
        began_s: When it began.
        ended_s: When it ended, on the same clock.
        deadline: Collectives issued before the optimizer's step; what must be sent before that step has the spans
            0 to ``deadline``.
        collectives: What the training sent, in the order of issue.
    """

    began_s: float
    ended_s: float
    deadline: int
    collectives: tuple[Collective, ...]

    @property
    def shape(self) -> Shape:
        """What must be equal for two iterations to be comparable span by span."""
        return tuple((collective.name, collective.size_bytes) for collective in self.collectives)

    @property
    def duration_s(self) -> float:
        """How long the iteration took."""
        return self.ended_s - self.began_s

    def idle_spans_s(self) -> tuple[float, ...]:
        """Returns the length of every idle span, one more than there are collectives."""
        ends_s = (*(collective.start_s for collective in self.collectives), self.ended_s)
        return tuple(max(0.0, end_s - begin_s) for begin_s, end_s in zip(self._begins_s(), ends_s, strict=True))

    def periods_s(self) -> tuple[float, ...]:
        """Returns the time from every idle span's beginning to that of the next; the last one's ends the iteration."""
        begins_s = self._begins_s()
        ends_s = (*begins_s[1:], self.ended_s)
        return tuple(max(0.0, end_s - begin_s) for begin_s, end_s in zip(begins_s, ends_s, strict=True))

    def _begins_s(self) -> tuple[float, ...]:
        """When every span begins: all collectives before it are over."""
        return tuple(itertools.accumulate((one.end_s for one in self.collectives), max, initial=self.began_s))


@dataclass(frozen=True, slots=True)
class IdleSpan:
    """One idle span over several iterations.

    Attributes:
        mean_s: Its mean length.
        std_s: The standard deviation of its length (of a sample); 0.0 of a single iteration.
    """

    mean_s: float
    std_s: float


@dataclass(frozen=True, slots=True)
class IdleProfile:
    """The idle spans of iterations of one shape.

    Attributes:
        shape: That shape.
        spans: One more than the shape has collectives.
        deadline: As in `IterationTrace`.
        iteration_s: Mean duration of an iteration.
        iterations: How many were averaged.
        periods_s: Mean time from every span's beginning to that of the next; empty where that is not known.
    """

    shape: Shape
    spans: tuple[IdleSpan, ...]
    deadline: int
    iteration_s: float
    iterations: int
    periods_s: tuple[float, ...] = ()

    @property
    def means_s(self) -> tuple[float, ...]:
        """Mean length of every span."""
        return tuple(span.mean_s for span in self.spans)

    @property
    def idle_s(self) -> float:
        """Time of an iteration in which training leaves the network alone."""
        return math.fsum(self.means_s)

    @property
    def spread(self) -> float:
        """Standard deviations of all spans as a part of their means, long spans counting more; 0.0 without idle time.

        The paper reports less than 0.1 (normalised standard deviation of the spans).
        """
        return math.fsum(span.std_s for span in self.spans) / self.idle_s if self.idle_s else 0.0


def average(traces: Sequence[IterationTrace]) -> IdleProfile:
    """Averages iterations of the same shape span by span.

    Raises:
        ValueError: There is no iteration, or they differ in shape or deadline.
    """
    if not traces:
        raise ValueError("an idle profile needs at least 1 iteration, got none: profile one first")
    first, shape = traces[0], traces[0].shape
    for index, trace in enumerate(traces):
        if (trace.shape, trace.deadline) != (shape, first.deadline):
            raise ValueError(
                f"an idle profile is of iterations alike: number 0 has {_summary(first)}, number {index} has "
                f"{_summary(trace)}: start a new profile when the shape changes"
            )
    return IdleProfile(
        shape=shape,
        spans=tuple(map(_span, zip(*(trace.idle_spans_s() for trace in traces), strict=True))),
        deadline=first.deadline,
        iteration_s=statistics.fmean(trace.duration_s for trace in traces),
        iterations=len(traces),
        periods_s=tuple(map(statistics.fmean, zip(*(trace.periods_s() for trace in traces), strict=True))),
    )


def _span(lengths_s: Sequence[float]) -> IdleSpan:
    return IdleSpan(statistics.fmean(lengths_s), statistics.stdev(lengths_s) if len(lengths_s) > 1 else 0.0)


def _summary(trace: IterationTrace) -> str:
    size_bytes = sum(collective.size_bytes for collective in trace.collectives)
    return f"{len(trace.collectives)} collectives of {size_bytes} bytes, {trace.deadline} of them before the step"
