from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations
from math import comb

import pytest

from lightning_gemini.core import survivable_sets
from lightning_gemini.core.placement import STRATEGIES, Placement, plan_placement
from lightning_gemini.core.survival import (
    Odds,
    corollary_bound,
    domain_recovery_probability,
    recovery_odds,
    recovery_probability,
)
from lightning_gemini.errors import PlacementError


def union_bound_of_the_ring(machines: int, replicas: int, failed: int) -> Fraction:
    """What the paper's figure plots for the ring."""
    return 1 - Fraction(machines * comb(machines - replicas, failed - replicas), comb(machines, failed))


@pytest.mark.parametrize(
    ("machines", "replicas", "failed", "group", "ring", "plotted"),
    [
        (16, 2, 2, Fraction(112, 120), Fraction(104, 120), Fraction(104, 120)),
        (16, 2, 3, Fraction(448, 560), Fraction(352, 560), Fraction(6, 10)),
        (16, 2, 4, Fraction(1120, 1820), Fraction(660, 1820), Fraction(2, 10)),
        (16, 4, 4, Fraction(1816, 1820), Fraction(1804, 1820), Fraction(1804, 1820)),
        (12, 3, 3, Fraction(216, 220), Fraction(208, 220), Fraction(208, 220)),
        (8, 2, 2, Fraction(24, 28), Fraction(20, 28), Fraction(20, 28)),
        (4, 2, 2, Fraction(4, 6), Fraction(2, 6), Fraction(2, 6)),
    ],
)
def test_groups_and_rings(
    machines: int, replicas: int, failed: int, group: Fraction, ring: Fraction, plotted: Fraction
) -> None:
    for strategy in ("group", "mixed", "compact"):
        assert recovery_probability(plan_placement(machines, replicas, strategy), failed) == group
    assert recovery_probability(plan_placement(machines, replicas, "ring"), failed) == ring
    assert union_bound_of_the_ring(machines, replicas, failed) == plotted


@pytest.mark.parametrize(
    ("machines", "replicas", "failed", "probability"),
    [
        (5, 2, 2, Fraction(6, 10)),
        (7, 2, 2, Fraction(16, 21)),
        (9, 2, 2, Fraction(30, 36)),
        (11, 2, 2, Fraction(48, 55)),
        (4, 3, 3, Fraction(0)),
        (5, 3, 3, Fraction(5, 10)),
        (7, 3, 3, Fraction(30, 35)),
        (8, 3, 3, Fraction(50, 56)),
        (10, 3, 3, Fraction(114, 120)),
        (11, 3, 3, Fraction(158, 165)),
        (7, 2, 3, Fraction(12, 35)),
        (9, 2, 3, Fraction(44, 84)),
        (11, 2, 3, Fraction(104, 165)),
        (7, 3, 4, Fraction(18, 35)),
        (8, 3, 4, Fraction(45, 70)),
        (10, 3, 4, Fraction(171, 210)),
        (11, 3, 4, Fraction(279, 330)),
    ],
)
def test_mixed(machines: int, replicas: int, failed: int, probability: Fraction) -> None:
    assert recovery_probability(plan_placement(machines, replicas), failed) == probability


def test_theorem_1() -> None:
    """At k = m: 1 - n / C(N, m), n = distinct holder sets; mixed is within (2m - 3) / C(N, m) of the best possible."""
    for replicas in range(1, 7):
        for machines in range(replicas, 30):
            placement = plan_placement(machines, replicas)
            probability = recovery_probability(placement, replicas)
            cases = comb(machines, replicas)
            assert probability == 1 - Fraction(len(placement.distinct_holder_sets), cases)
            best = 1 - Fraction(-(-machines // replicas), cases)
            assert best - probability <= Fraction(max(0, 2 * replicas - 3), cases)


def test_corollary_1() -> None:
    assert corollary_bound(16, 2, 4) == Fraction(6, 10)
    assert corollary_bound(16, 2, 1) == 1
    assert corollary_bound(16, 2, 16) == 0
    for replicas in range(1, 5):
        for machines in range(replicas, 17):
            for failed in range(machines + 1):
                exact = recovery_probability(plan_placement(machines, replicas), failed)
                bound = corollary_bound(machines, replicas, failed)
                assert bound <= exact
                if machines % replicas == 0 and failed < 2 * replicas:
                    assert bound == exact


def counted_one_by_one(placement: Placement, units: list[set[int]], failed: int) -> Fraction:
    """Losing whole units (machines, or racks), by looking at every case."""
    cases = list(combinations(units, failed))
    return Fraction(sum(placement.recoverable(set().union(*case)) for case in cases), len(cases))


def all_placements(machines: int) -> Iterator[tuple[Placement, list[str]]]:
    domains = [f"rack{machine % 3 if machine < 7 else machine // 3}" for machine in range(machines)]
    for replicas in range(1, machines + 1):
        for strategy in STRATEGIES:
            if strategy != "group" or machines % replicas == 0:
                yield plan_placement(machines, replicas, strategy, domains), domains


@pytest.mark.parametrize("machines", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_closed_form_agrees_with_looking_at_every_case(machines: int) -> None:
    for placement, domains in all_placements(machines):
        each = [{machine} for machine in range(machines)]
        for failed in range(machines + 1):
            assert recovery_probability(placement, failed) == counted_one_by_one(placement, each, failed)
        racks = [{m for m in range(machines) if domains[m] == domain} for domain in sorted(set(domains))]
        for failed in range(len(racks) + 1):
            expected = counted_one_by_one(placement, racks, failed)
            assert domain_recovery_probability(placement, domains, failed) == expected


def test_any_placement_is_counted_exactly(seed: int) -> None:
    draws = random.Random(seed)
    for _ in range(30):
        machines = draws.randint(2, 9)
        replicas = draws.randint(1, machines)
        holder_sets = tuple(
            (owner, *draws.sample([other for other in range(machines) if other != owner], replicas - 1))
            for owner in range(machines)
        )
        placement = Placement((tuple(range(machines)),), holder_sets)
        each = [{machine} for machine in range(machines)]
        for failed in range(machines + 1):
            assert recovery_probability(placement, failed) == counted_one_by_one(placement, each, failed)


def test_a_thousand_machines() -> None:
    machines = 1000
    domains = [f"rack{machine // 20}" for machine in range(machines)]
    for replicas in (2, 3, 7):
        for strategy in ("mixed", "ring", "compact", "rack"):
            placement = plan_placement(machines, replicas, strategy, domains)
            for failed in (replicas, 50):
                probability = recovery_probability(placement, failed)
                bound = len(placement.distinct_holder_sets) * comb(machines - replicas, failed - replicas)
                assert 1 - Fraction(bound, comb(machines, failed)) <= probability < 1
            assert recovery_probability(placement, 998) == 0
        # 50 racks of 20: neighbours share a rack, unless the placement knows of racks.
        assert domain_recovery_probability(plan_placement(machines, replicas), domains, 1) < 1
        assert domain_recovery_probability(plan_placement(machines, replicas, "rack", domains), domains, 1) == 1


def test_racks_spread_over_the_groups_survive_their_loss() -> None:
    domains = list("aaaabbbbccccdddd")
    blind, aware = plan_placement(16, 2), plan_placement(16, 2, "rack", domains)
    assert [domain_recovery_probability(blind, domains, k) for k in (0, 1, 2)] == [1, 0, 0]
    # a and b hold each other's shards, c and d too: 2 of 6 pairs of racks are fatal
    assert [domain_recovery_probability(aware, domains, k) for k in (0, 1, 2, 3)] == [1, 1, Fraction(4, 6), 0]
    assert recovery_probability(blind, 2) == recovery_probability(aware, 2)


# -- estimates ---------------------------------------------------------------------------------------------------------


def random_placement(machines: int, replicas: int, draws: random.Random) -> Placement:
    """Holders drawn at random: no structure that a closed form could use."""
    others = [draws.sample(range(machines), replicas) for _ in range(machines)]
    holder_sets = tuple(
        (owner, *[m for m in drawn if m != owner][: replicas - 1]) for owner, drawn in enumerate(others)
    )
    return Placement((tuple(range(machines)),), holder_sets)


def test_what_is_too_costly_is_estimated_and_says_so(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = random.Random(seed)
    placement = random_placement(14, 3, draws)
    exact = recovery_probability(placement, 5)
    assert recovery_odds(placement, 5, draws) == Odds(exact, float(exact), float(exact))
    monkeypatch.setattr(survivable_sets, "MOST_CASES", 10)
    with pytest.raises(PlacementError, match=r"estimate it \(recovery_odds\)"):
        recovery_probability(placement, 5)
    odds = recovery_odds(placement, 5, draws, samples=3000)
    assert odds.exact is None
    assert odds.low - 0.05 < exact < odds.high + 0.05  # the interval misses once in a hundred, by little
    assert odds.low < odds.value < odds.high
    assert odds.high - odds.low < 0.06
    racks = [str(machine // 2) for machine in range(14)]
    by_rack = recovery_odds(placement, 2, draws, domains=racks, samples=3000)
    monkeypatch.undo()
    assert by_rack.low - 0.05 < domain_recovery_probability(placement, racks, 2) < by_rack.high + 0.05


def test_an_estimate_never_claims_certainty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivable_sets, "MOST_CASES", 0)
    placement = plan_placement(11, 6, "compact")
    odds = recovery_odds(placement, 6, random.Random(1), samples=50)
    assert odds.exact is None
    assert odds.low < odds.high


def test_a_large_placement_without_structure_is_refused_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivable_sets, "MOST_CASES", 50_000)
    placement = random_placement(300, 3, random.Random(3))
    assert 0 < recovery_probability(placement, 2) <= 1
    with pytest.raises(PlacementError):
        recovery_probability(placement, 150)


@pytest.mark.parametrize("failed", [-1, 5])
def test_impossible_numbers_are_refused(failed: int) -> None:
    placement = plan_placement(4, 2)
    with pytest.raises(PlacementError, match="between 0 and 4"):
        recovery_probability(placement, failed)
    with pytest.raises(PlacementError, match="between 0 and 2"):
        domain_recovery_probability(placement, ["a", "a", "b", "b"], failed)
    with pytest.raises(PlacementError, match="got 3 for 4 machines"):
        domain_recovery_probability(placement, ["a", "a", "b"], 1)
    with pytest.raises(PlacementError, match="between 0 and 4"):
        corollary_bound(4, 2, failed)
    with pytest.raises(PlacementError, match="replicas must be between 1 and 4"):
        corollary_bound(4, 5, 1)
