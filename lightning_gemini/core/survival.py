"""How likely memory still serves every shard after failures (GEMINI, SOSP '23, section 4).

Failures hit k machines, or k failure domains as a whole, every choice of k being as likely as any other. A probability
is exact, a `fractions.Fraction`; where that is too costly, `recovery_odds` estimates it, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, sqrt
from typing import Protocol

from lightning_gemini.core.placement import Placement
from lightning_gemini.core.survivable_sets import TooManyCasesError, survivable_count
from lightning_gemini.errors import PlacementError

__all__ = ["Odds", "Sampler", "corollary_bound", "domain_recovery_probability", "recovery_odds", "recovery_probability"]

_Z = 2.5758  # of a normal distribution, 99 % lie within


class Sampler(Protocol):
    """A source of random choices; `random.Random` is one."""

    def sample(self, population: Sequence[int], k: int) -> list[int]:
        """Draws ``k`` different items, every choice as likely as any other."""


@dataclass(frozen=True, slots=True)
class Odds:
    """A probability, or what is known of it.

    Attributes:
        exact: The probability; ``None`` where it was estimated.
        low: Lower end of the 99 % confidence interval; the probability itself where that is exact.
        high: Its upper end.
    """

    exact: Fraction | None
    low: float
    high: float

    @property
    def value(self) -> float:
        """The probability, or the middle of what is known."""
        return float(self.exact) if self.exact is not None else (self.low + self.high) / 2


def recovery_probability(placement: Placement, failed: int) -> Fraction:
    """Returns the probability that memory serves every shard after ``failed`` machines are lost at once.

    Raises:
        PlacementError: If the job has fewer machines, or the exact count is too costly (`TooManyCasesError`), which it
            is for no strategy with fewer than a hundred replicas.
    """
    machines = len(placement.holder_sets)
    _check_lost(failed, machines, "machines")
    return Fraction(
        survivable_count(_in_groups(placement), placement.distinct_holder_sets, failed), comb(machines, failed)
    )


def domain_recovery_probability(placement: Placement, domains: Sequence[str], failed: int) -> Fraction:
    """Returns the probability that memory serves every shard after ``failed`` whole failure domains are lost at once.

    Args:
        placement: Who holds whose shards.
        domains: Failure domain of every machine.
        failed: Number of domains lost, out of all that ``domains`` names.

    Raises:
        PlacementError: If there are fewer domains, or the exact count is too costly (`TooManyCasesError`).
    """
    order, fatal = _over_domains(placement, domains)
    _check_lost(failed, len(order), "failure domains")
    return Fraction(survivable_count(order, fatal, failed), comb(len(order), failed))


def recovery_odds(
    placement: Placement,
    failed: int,
    sampler: Sampler,
    *,
    domains: Sequence[str] | None = None,
    samples: int = 20_000,
) -> Odds:
    """Returns the exact probability where it can be had at a reasonable cost, else an estimate from random failures.

    Args:
        placement: Who holds whose shards.
        failed: Machines lost at once; failure domains, if ``domains`` is given.
        sampler: What draws the failures of the estimate.
        domains: Failure domain of every machine.
        samples: Failures drawn for an estimate.

    Raises:
        PlacementError: If there are not that many machines or domains.
    """
    try:
        if domains is None:
            exact = recovery_probability(placement, failed)
        else:
            exact = domain_recovery_probability(placement, domains, failed)
    except TooManyCasesError:
        return _estimate(placement, failed, sampler, domains, samples)
    return Odds(exact, float(exact), float(exact))


def corollary_bound(machines: int, replicas: int, failed: int) -> Fraction:
    """Returns the paper's lower bound for the default placement (Corollary 1): 1 if k < m, else a union bound.

    Each of the n holder sets is lost with probability C(N-m, k-m) / C(N, k). Groups have n = N/m; where m does not
    divide N, n is that of the mixed placement (Theorem 1), which the paper leaves out.

    Raises:
        PlacementError: If the numbers are impossible.
    """
    if not 1 <= replicas <= machines:
        raise PlacementError(f"replicas must be between 1 and {machines}, the number of machines, got {replicas}")
    _check_lost(failed, machines, "machines")
    if failed < replicas:
        return Fraction(1)
    groups, leftover = divmod(machines, replicas)
    sets = groups + (replicas + leftover - 1 if leftover else 0)
    return max(Fraction(0), 1 - Fraction(sets * comb(machines - replicas, failed - replicas), comb(machines, failed)))


def _check_lost(failed: int, units: int, what: str) -> None:
    if not 0 <= failed <= units:
        raise PlacementError(f"lost {what} must be between 0 and {units}, which the job has, got {failed}")


def _in_groups(placement: Placement) -> list[int]:
    """Machines in the order of groups, in which a ring's neighbours are neighbours."""
    return [machine for group in placement.groups for machine in group]


def _over_domains(placement: Placement, domains: Sequence[str]) -> tuple[list[int], set[frozenset[int]]]:
    """Domains as numbers, and those of each holder set: a shard is lost when all its domains are."""
    if len(domains) != len(placement.holder_sets):
        raise PlacementError(
            f"domains must name one failure domain a machine, got {len(domains)} for "
            f"{len(placement.holder_sets)} machines"
        )
    numbers: dict[str, int] = {}
    for machine in _in_groups(placement):
        numbers.setdefault(domains[machine], len(numbers))
    fatal = {frozenset(numbers[domains[machine]] for machine in holders) for holders in placement.distinct_holder_sets}
    return list(numbers.values()), fatal


def _estimate(placement: Placement, failed: int, sampler: Sampler, domains: Sequence[str] | None, samples: int) -> Odds:
    """Draws failures, and gives Wilson's score interval."""
    if domains is None:
        units, fatal = _in_groups(placement), set(placement.distinct_holder_sets)
    else:
        units, fatal = _over_domains(placement, domains)
    survived = 0
    for _ in range(samples):
        lost = set(sampler.sample(units, failed))
        survived += not any(one <= lost for one in fatal)
    share, weight = survived / samples, _Z**2 / samples
    middle = (share + weight / 2) / (1 + weight)
    spread = _Z * sqrt(share * (1 - share) / samples + weight / (4 * samples)) / (1 + weight)
    return Odds(None, max(0.0, middle - spread), min(1.0, middle + spread))
