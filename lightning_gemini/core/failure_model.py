"""Failure models: which faults a job is to suffer, and when, drawn from a seed.

A model turns the shape of a job and a source of random numbers into planned faults, one after the other; what carries
them out is `lightning_gemini.controlplane.faults`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from lightning_gemini.core.fault import (
    CORRELATED,
    CORRUPT,
    ETCD,
    GROUP,
    HARDWARE,
    LASTING,
    ROOT,
    SOFTWARE,
    PlannedFault,
    Targets,
)
from lightning_gemini.errors import ConfigurationError

SECONDS_PER_DAY = 86400.0
# Losing a group waits for a persistent checkpoint; a byte that flips between its check and its use is seen by nobody.
_NEVER_OVERLAP = (CORRELATED, GROUP, CORRUPT)
_Item = TypeVar("_Item")


class Draws(Protocol):
    """A source of random numbers; `random.Random` is one."""

    def random(self) -> float:
        """Uniform in [0, 1)."""

    def randrange(self, stop: int, /) -> int:
        """Uniform among 0 … stop - 1."""

    def choice(self, seq: Sequence[_Item], /) -> _Item:
        """Uniform among the items."""

    def uniform(self, a: float, b: float) -> float:
        """Uniform between a and b."""


class FailureModel(Protocol):
    """Plans faults."""

    @property
    def kinds(self) -> Collection[str]:
        """The kinds of faults that may come."""

    def faults(self, targets: Targets, draws: Draws) -> Iterator[PlannedFault]:
        """Yields faults in the order in which they come, without end for some models.

        Raises:
            ConfigurationError: The job has nothing that a fault of the model could hit.
        """


@dataclass(frozen=True, slots=True)
class SequenceModel:
    """Given kinds one after the other, each somewhere in the middle half of its stretch of optimizer steps.

    Attributes:
        kinds: In this order.
        stretch: Optimizer steps for each.
        repeat: How often the whole list comes.
        lasts_s: Of pauses and cut links.
        needs_persistent: Whether the loss of several machines waits for a persistent checkpoint.
    """

    kinds: tuple[str, ...]
    stretch: int = 20
    repeat: int = 1
    lasts_s: float = 3.0
    needs_persistent: bool = True

    def faults(self, targets: Targets, draws: Draws) -> Iterator[PlannedFault]:
        """See `FailureModel.faults`."""
        for index, kind in enumerate(self.kinds * self.repeat):
            victims, rank = draw_victims(kind, targets, draws)
            low, high = max(1, self.stretch // 4), max(1, self.stretch * 3 // 4)
            yield PlannedFault(
                kind,
                victims,
                rank,
                at_step=index * self.stretch + low + draws.randrange(high - low + 1),
                lasts_s=self.lasts_s if kind in LASTING else None,
                needs_persistent=self.needs_persistent and kind in (CORRELATED, GROUP),
            )


@dataclass(frozen=True, slots=True)
class PoissonModel:
    """Every kind comes as a Poisson process of its own, as in GEMINI, section 7.3 (OPT-175B: 1.5 % of machines a day).

    Attributes:
        rates: Kind → faults per machine-day. For faults of several machines: how often each domain or group goes; for
            etcd: each member.
        lasts_s: Of pauses and cut links.
    """

    rates: Mapping[str, float]
    lasts_s: float = 3.0

    @property
    def kinds(self) -> Collection[str]:
        """See `FailureModel.kinds`."""
        return [kind for kind, rate in self.rates.items() if rate > 0]

    def rates_per_s(self, targets: Targets) -> dict[str, float]:
        """Faults a second that the whole job suffers, by kind."""
        return {
            kind: rate * targets.units(kind) / SECONDS_PER_DAY for kind, rate in sorted(self.rates.items()) if rate > 0
        }

    def faults(self, targets: Targets, draws: Draws) -> Iterator[PlannedFault]:
        """See `FailureModel.faults`."""
        per_s = self.rates_per_s(targets)
        total, time_s = math.fsum(per_s.values()), 0.0
        while total > 0:
            time_s += -math.log(1.0 - draws.random()) / total
            kind = draw_weighted(per_s, draws)
            victims, rank = draw_victims(kind, targets, draws)
            yield PlannedFault(kind, victims, rank, time_s=time_s, lasts_s=self.lasts_s if kind in LASTING else None)


@dataclass(frozen=True, slots=True)
class TraceModel:
    """Faults that were written down, see `lightning_gemini.core.fault_trace`."""

    planned: tuple[PlannedFault, ...] = ()

    @property
    def kinds(self) -> Collection[str]:
        """See `FailureModel.kinds`."""
        return {fault.kind for fault in self.planned}

    def faults(self, targets: Targets, draws: Draws) -> Iterator[PlannedFault]:
        """See `FailureModel.faults`."""
        for fault in self.planned:
            limit = targets.etcd_members if fault.kind == ETCD else targets.machines
            if bad := [victim for victim in fault.victims if not 0 <= victim < limit]:
                raise ConfigurationError(f"the job has victims 0 to {limit - 1} for {fault.kind} faults, got {bad[0]}")
            victims, rank = (fault.victims, fault.rank) if fault.victims else draw_victims(fault.kind, targets, draws)
            yield replace(fault, victims=victims, rank=rank)


@dataclass(frozen=True, slots=True)
class SoakModel:
    """Faults without end, as fast as the job recovers, and sometimes faster.

    Attributes:
        weights: Kind → how often it comes, relative to the others.
        calm_s: Bounds of the quiet after each recovery.
        overlap: Share of faults that do not wait for the recovery from the one before.
        overlap_s: Bounds of the time between such two.
        lasts_s: Bounds of how long pauses and cut links last.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    calm_s: tuple[float, float] = (0.5, 3.0)
    overlap: float = 0.2
    overlap_s: tuple[float, float] = (0.0, 3.0)
    lasts_s: tuple[float, float] = (0.5, 3.0)

    @property
    def kinds(self) -> Collection[str]:
        """See `FailureModel.kinds`."""
        return [kind for kind, weight in self.weights.items() if weight > 0]

    def faults(self, targets: Targets, draws: Draws) -> Iterator[PlannedFault]:
        """See `FailureModel.faults`. A flipped byte is followed at once by a kill, so that somebody reads it."""
        before = ""
        while True:
            kind = HARDWARE if before == CORRUPT and draws.random() < 0.4 else draw_weighted(self.weights, draws)
            if before == CORRUPT and kind not in (HARDWARE, ROOT):
                kind = SOFTWARE
            yield self._fault(kind, before, targets, draws)
            before = kind

    def _fault(self, kind: str, before: str, targets: Targets, draws: Draws) -> PlannedFault:
        victims, rank = draw_victims(kind, targets, draws)
        moment: dict[str, Any] = {"calm_s": draws.uniform(*self.calm_s)}
        if before == CORRUPT:
            moment = {"after_s": 0.0}
        elif before and kind not in _NEVER_OVERLAP and draws.random() < self.overlap:
            moment = {"after_s": draws.uniform(*self.overlap_s)}
        lasts_s = draws.uniform(*self.lasts_s) if kind in LASTING else None
        needs = kind in (CORRELATED, GROUP)
        return PlannedFault(kind, victims, rank, lasts_s=lasts_s, needs_persistent=needs, **moment)


def draw_victims(kind: str, targets: Targets, draws: Draws) -> tuple[tuple[int, ...], int | None]:
    """Draws the machines (or the etcd member) that a fault hits, and the rank where it hits one worker."""
    units = targets.units(kind)
    if kind == ROOT:
        return (), None
    if kind == CORRELATED:
        return draws.choice(targets.domain_machines()), None
    if kind == GROUP:
        return draws.choice(targets.groups), None
    victim = draws.randrange(units)
    local_rank = draws.randrange(targets.nproc_per_machine) if kind == SOFTWARE else 0
    return (victim,), victim * targets.nproc_per_machine + local_rank if kind == SOFTWARE else None


def draw_weighted(weights: Mapping[str, float], draws: Draws) -> str:
    """Draws a key, each in proportion to its weight."""
    if not weights or math.fsum(weights.values()) <= 0:
        raise ConfigurationError("a failure model needs at least one kind with a weight or rate above 0")
    left = draws.random() * math.fsum(weights.values())
    for kind in sorted(weights):
        left -= weights[kind]
        if left < 0 and weights[kind] > 0:
            return kind
    return max(sorted(weights), key=lambda kind: weights[kind])
