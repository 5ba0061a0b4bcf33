"""The virtual network: how long what one machine says takes to reach another, and whether it can at all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tests.simulation.scheduler import Scheduler

_LOCAL_S = 0.00003
_STRAY_CHANCE = 0.01


@dataclass(frozen=True, slots=True)
class Cut:
    """Nothing gets from ``sources`` to ``targets`` before ``until_s``."""

    sources: frozenset[Any]
    targets: frozenset[Any]
    until_s: float


class Network:
    """Links between machines. A cut holds what is under way, as TCP does, until it is over.

    Args:
        scheduler: The clock.
        latency_s: One way, without load.
        bytes_per_s: Of a link.
    """

    def __init__(self, scheduler: Scheduler, latency_s: float, bytes_per_s: float) -> None:
        self._scheduler = scheduler
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.slow_until_s = 0.0
        self._cuts: list[Cut] = []

    def cut(self, sources: Collection[Any], targets: Collection[Any], duration_s: float, *, both_ways: bool) -> None:
        """Cuts machines off from others."""
        until_s = self._scheduler.now + duration_s
        one, other = frozenset(sources), frozenset(targets)
        self._cuts.append(Cut(one, other, until_s))
        if both_ways:
            self._cuts.append(Cut(other, one, until_s))

    def blocked_until(self, source: Any, target: Any) -> float:
        """When what ``source`` sends to ``target`` gets through again; 0 where nothing is in the way."""
        if not self._cuts:
            return 0.0
        now = self._scheduler.now
        self._cuts = [cut for cut in self._cuts if cut.until_s > now]
        found = (cut.until_s for cut in self._cuts if source in cut.sources and target in cut.targets)
        return max(found, default=0.0)

    def reachable(self, one: Any, other: Any) -> bool:
        """Whether a conversation is possible."""
        return not self._cuts or not (self.blocked_until(one, other) or self.blocked_until(other, one))

    def delay_s(self, source: Any, target: Any, size_bytes: int = 0) -> float:
        """How long a message takes; now and then, and in bad times often, much longer than usual."""
        draw = self._scheduler.random.random
        if source is target:
            return _LOCAL_S * (0.5 + draw())
        usual_s = self.latency_s * (0.5 + draw()) + size_bytes / self.bytes_per_s
        slow = self._scheduler.now < self.slow_until_s
        if draw() < (0.3 if slow else _STRAY_CHANCE):
            return usual_s + self.latency_s * 50 * draw() * (4 if slow else 1)
        return usual_s
