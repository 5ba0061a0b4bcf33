"""Tells from outside when a job trains again."""

from __future__ import annotations

from lightning_gemini.controlplane.faults.observer import Sighting
from lightning_gemini.core.fault import CORRELATED, GROUP, HARDWARE, ROOT, SOFTWARE

_DEADLY = (SOFTWARE, HARDWARE, ROOT, CORRELATED, GROUP)
_LONGEST_WITHOUT_GENERATION_S = 15.0


class RecoveryWatch:
    """Sees every rank complete a step after the last fault.

    Attributes:
        calm_since: Since when the job trains undisturbed (`time.monotonic`), None while it does not.
    """

    def __init__(self) -> None:
        self.calm_since: float | None = None
        self._at_least = 0  # the generation that the last fault must lead to
        self._hit_at: float | None = None
        self._workers: dict[int, int] = {}
        self._before: dict[int, int] = {}  # progress of the ranks when these workers were first seen

    def hit(self, kind: str, seen: Sighting) -> None:
        """A fault was done just now."""
        self.calm_since, self._workers, self._hit_at = None, {}, None
        if kind in _DEADLY:
            self._at_least = seen.generation + 1

    def see(self, seen: Sighting, now: float, *, calm: bool) -> None:
        """Takes a sighting.

        Args:
            seen: The job.
            now: `time.monotonic`.
            calm: Nothing is stopped or cut now.
        """
        self._hit_at = now if self._hit_at is None else self._hit_at
        # The death of a root that had no slot starts no generation.
        late = now - self._hit_at > _LONGEST_WITHOUT_GENERATION_S
        if not calm or not seen.in_order or (seen.generation < self._at_least and not late):
            self.calm_since, self._workers = None, {}
        elif seen.workers != self._workers:
            self.calm_since, self._workers, self._before = None, seen.workers, seen.progress
        elif self.calm_since is None and self._all_moved(seen.progress, seen.world_size):
            self.calm_since = now

    def _all_moved(self, progress: dict[int, int], world_size: int) -> bool:
        return len(progress) == world_size and all(step != self._before.get(rank) for rank, step in progress.items())
