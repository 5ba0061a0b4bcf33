"""When a profile of the idle spans no longer describes training."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from lightning_gemini.core.idle_spans import IdleProfile, IterationTrace

_ITERATIONS = 8
_LEAST_CHANGE = 0.25
_WAITS = 8
_STANDARD_ERRORS = 3


def overhead(durations_s: Sequence[float], profile: IdleProfile) -> float:
    """By which part iterations take longer than profiled ones, at the least: three standard errors are taken off.

    Args:
        durations_s: Of iterations with checkpoint traffic, two or more.
        profile: Of iterations without.
    """
    count, mean_s = len(durations_s), statistics.fmean(durations_s)
    of_these = math.fsum((duration_s - mean_s) ** 2 for duration_s in durations_s) / (count - 1) / count
    of_those = profile.iteration_std_s**2 / profile.iterations
    longer_s = mean_s - profile.iteration_s
    return (longer_s - _STANDARD_ERRORS * math.sqrt(of_these + of_those)) / profile.iteration_s


class DriftWatch:
    """Compares iterations with the profile that a plan was made from; medians, so that an epoch's end changes nothing.

    Args:
        profile: What the plan was made from.
        every: Iterations from one version to the next.
        budget: Part by which training may get slower.
        patience: Iterations whose durations are taken together, to tell a small part from chance.

    Attributes:
        durations_s: Of the iterations taken last, ``patience`` of them at most.
    """

    def __init__(self, profile: IdleProfile, every: int, budget: float, patience: int) -> None:
        self._profile, self._budget, self._patience = profile, budget, patience
        self._budget_s = budget * every * profile.iteration_s
        self.durations_s: deque[float] = deque(maxlen=patience)
        self._taken = 0
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
        self._durations.append(trace.duration_s)
        if len(self._durations) < _ITERATIONS:
            return None
        now_s, then_s = statistics.median(self._durations), self._profile.iteration_s
        if abs(now_s - then_s) > self._tolerance_s:
            return f"an iteration takes {now_s:.3g} s now, {then_s:.3g} s when it was profiled"
        return self._over_budget(trace.duration_s)

    def _over_budget(self, duration_s: float) -> str | None:
        self.durations_s.append(duration_s)
        self._taken += 1
        if self._taken % self._patience:
            return None
        slower = overhead(self.durations_s, self._profile)
        if slower <= self._budget:
            return None
        return f"iterations take {slower:.1%} longer than profiled ones, the budget is {self._budget:.1%}"

    def take_wait(self, seconds: float) -> str | None:
        """Notes how long training waited for one more version; returns that it keeps being too long, or ``None``."""
        self._waits.append(seconds)
        if len(self._waits) < _WAITS:
            return None
        wait_s = statistics.median(self._waits)
        if wait_s > self._budget_s:
            return f"training waits {wait_s * 1e3:.1f} ms for a version, the budget is {self._budget_s * 1e3:.1f} ms"
        return None
