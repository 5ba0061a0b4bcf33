"""What ``lightning-gemini plan`` finds out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gemini.config import PLACEMENTS
from lightning_gemini.core.host_memory import host_memory_bytes
from lightning_gemini.core.placement import Placement, placement_to_json, plan_placement
from lightning_gemini.core.survival import Odds, Sampler, corollary_bound, recovery_odds


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked for.

    Attributes:
        machines: Machines of the job.
        replicas: Copies of every shard, the owner's included.
        strategy: Placement strategy.
        domains: Failure domain of every machine, if they are known.
        checkpoint_bytes: Checkpoint of the whole job, if it is known.
        nproc_per_machine: Ranks on each machine.
        failures: The most lost machines (and domains) to look at; by default enough to see where memory fails.
    """

    machines: int
    replicas: int
    strategy: str
    domains: tuple[str, ...] | None = None
    checkpoint_bytes: int | None = None
    nproc_per_machine: int = 1
    failures: int | None = None

    def most_failures(self) -> int:
        """The most lost machines to look at."""
        return min(self.machines, self.failures or max(4, 2 * self.replicas))

    def most_domains(self) -> int:
        """The most lost failure domains to look at."""
        return min(len(set(self.domains or ())), self.most_failures())


@dataclass(frozen=True, slots=True)
class Choice:
    """One placement and what it gives.

    Attributes:
        names: Strategies that give the same.
        replicas: Copies of every shard.
        placement: Who holds what.
        by_machines: Odds by number of lost machines.
        by_domains: Odds by number of lost failure domains; empty where these are not known.
        memory_bytes: Host memory of every machine, if the size of the checkpoint is known.
    """

    names: tuple[str, ...]
    replicas: int
    placement: Placement
    by_machines: dict[int, Odds]
    by_domains: dict[int, Odds]
    memory_bytes: int | None

    @classmethod
    def of(cls, request: PlanRequest, strategy: str, replicas: int, lost: Sequence[int], sampler: Sampler) -> Choice:
        """Plans and rates a placement for these numbers of ``lost`` machines.

        Raises:
            PlacementError: It is impossible.
        """
        placement = plan_placement(request.machines, replicas, strategy, request.domains)
        domains_lost = range(1, request.most_domains() + 1)
        size = request.checkpoint_bytes
        return cls(
            (strategy,),
            replicas,
            placement,
            {number: recovery_odds(placement, number, sampler) for number in lost},
            {number: recovery_odds(placement, number, sampler, domains=request.domains) for number in domains_lost},
            None if size is None else host_memory_bytes(size, request.machines, replicas),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the placement."""
        return {
            "strategies": list(self.names),
            "replicas": self.replicas,
            "distinct_holder_sets": len(self.placement.distinct_holder_sets),
            "recovery": [{"failed_machines": k, **_odds_to_json(odds)} for k, odds in self.by_machines.items()],
            "domain_recovery": [{"failed_domains": k, **_odds_to_json(odds)} for k, odds in self.by_domains.items()],
            "host_memory_bytes": self.memory_bytes,
        }


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The plan that was asked for, and others beside it.

    Attributes:
        request: What was asked for.
        chosen: The plan.
        others: The same and other strategies, with one replica less, as many, and one more.
    """

    request: PlanRequest
    chosen: Choice
    others: tuple[Choice, ...]

    @classmethod
    def of(cls, request: PlanRequest, sampler: Sampler) -> PlanReport:
        """Plans.

        Raises:
            PlacementError: The request is impossible.
        """
        lost = range(1, request.most_failures() + 1)
        chosen = Choice.of(request, request.strategy, request.replicas, lost, sampler)
        return cls(request, chosen, tuple(_others(request, sampler)))

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists; probabilities as fractions and as decimals."""
        asked = self.request
        bounds = {k: corollary_bound(asked.machines, asked.replicas, k) for k in self.chosen.by_machines}
        return {
            "machines": asked.machines,
            "nproc_per_machine": asked.nproc_per_machine,
            "domains": None if asked.domains is None else list(asked.domains),
            "checkpoint_bytes": asked.checkpoint_bytes,
            **self.chosen.to_json(),
            "corollary_bound": [{"failed_machines": k, "bound": str(bound)} for k, bound in bounds.items()],
            "placement": placement_to_json(self.chosen.placement),
            "alternatives": [choice.to_json() for choice in self.others],
        }


def _others(request: PlanRequest, sampler: Sampler) -> Iterator[Choice]:
    """Other strategies and replicas; strategies that give the same are one choice."""
    first = max(1, request.replicas - 1)
    lost = range(first, min(request.machines, request.replicas + 2) + 1)
    for replicas in range(first, min(request.machines, request.replicas + 1) + 1):
        found: list[Choice] = []
        for strategy in PLACEMENTS:
            if strategy == "rack" and request.domains is None:
                continue
            if strategy == "group" and request.machines % replicas:
                continue
            choice = Choice.of(request, strategy, replicas, lost, sampler)
            same = next((i for i, other in enumerate(found) if _rating(other) == _rating(choice)), None)
            if same is None:
                found.append(choice)
            else:
                found[same] = replace(found[same], names=(*found[same].names, strategy))
        yield from found


def _rating(choice: Choice) -> tuple[Any, ...]:
    return len(choice.placement.distinct_holder_sets), choice.by_machines, choice.by_domains


def _odds_to_json(odds: Odds) -> dict[str, Any]:
    if odds.exact is None:
        return {"exact": None, "probability": odds.value, "low": odds.low, "high": odds.high}
    return {"exact": str(odds.exact), "probability": odds.value}
