"""When a profile of the idle spans no longer describes training."""

from __future__ import annotations

import statistics
from collections import deque

from lightning_gemini.core.idle_spans import IdleProfile, IterationTrace

_ITERATIONS = 8
_LEAST_CHANGE = 0.25
_WAITS = 8


class DriftWatch:
    """Compares iterations with the profile that a plan was made from; medians, so that an epoch's end changes nothing.

    Args:
        profile: What the plan was made from.
        budget_s: Seconds that a version may make training wait.
    """

    def __init__(self, profile: IdleProfile, budget_s: float) -> None:
        self._profile, self._budget_s = profile, budget_s
        spread_s = sum(span.std_s**2 for span in profile.spans) ** 0.5
        self._tolerance_s = max(_LEAST_CHANGE * profile.iteration_s, 4 * spread_s)
        self._other_shapes = 0
        self._durations: deque[float] = deque(maxlen=_ITERATIONS)
        self._waits: deque[float] = deque(maxlen=_WAITS)

    def take_iteration(self, trace: IterationTrace) -> str | None:
        """Looks at one more iteration; returns what has changed, or ``None``."""
        self._other_shapes = self._other_shapes + 1 if trace.shape != self._profile.shape else 0
        if self._other_shapes >= _ITERATIONS:
            return "training's collectives have changed"
        self._durations.append(trace.ended_s - trace.began_s)
        if len(self._durations) < _ITERATIONS:
            return None
        now_s, then_s = statistics.median(self._durations), self._profile.iteration_s
        if abs(now_s - then_s) > self._tolerance_s:
            return f"an iteration takes {now_s:.3g} s now, {then_s:.3g} s when it was profiled"
        return None

    def take_wait(self, seconds: float) -> str | None:
        """Notes how long training waited for one more version; returns that it keeps being too long, or ``None``."""
        self._waits.append(seconds)
        if len(self._waits) < _WAITS:
            return None
        wait_s = statistics.median(self._waits)
        if wait_s > self._budget_s:
            return f"training waits {wait_s * 1e3:.1f} ms for a version, the budget is {self._budget_s * 1e3:.1f} ms"
        return None
