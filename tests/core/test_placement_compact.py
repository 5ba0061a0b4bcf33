from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from math import comb, gcd
from pathlib import Path

import pytest

from lightning_gemini.core.placement import Placement, plan_placement
from lightning_gemini.core.survival import recovery_probability
from tests.core.balanced_placements import balanced_placements, fewest_distinct_sets, survivable_counts

DOCS = Path(__file__).parents[2] / "docs" / "placement.md"


def assert_balanced(placement: Placement, machines: int, replicas: int) -> None:
    hosted = Counter(holder for holders in placement.holder_sets for holder in holders)
    assert hosted == dict.fromkeys(range(machines), replicas)
    for owner, holders in enumerate(placement.holder_sets):
        assert holders[0] == owner
        assert len(set(holders)) == len(holders)


def continued_fraction(machines: int, replicas: int) -> int:
    total = 0
    while replicas:
        total += machines // replicas
        machines, replicas = replicas, machines % replicas
    return total


def masks(placement: Placement) -> set[int]:
    return {sum(1 << machine for machine in holders) for holders in placement.distinct_holder_sets}


def test_leftovers_of_one_less_than_a_group_share_holder_sets() -> None:
    placement = plan_placement(5, 3, "compact")
    assert placement.holder_sets == ((0, 1, 2), (1, 2, 0), (2, 3, 4), (3, 4, 0), (4, 1, 3))
    assert len(placement.distinct_holder_sets) == 4  # m+1, where the ring of mixed has 2m-1 = 5
    assert len(plan_placement(11, 6, "compact").distinct_holder_sets) == 7


def test_leftovers_that_share_a_divisor_with_the_group_make_a_ring_of_cells() -> None:
    placement = plan_placement(6, 4, "compact")
    assert placement.distinct_holder_sets == {frozenset(s) for s in ((0, 1, 2, 3), (0, 1, 4, 5), (2, 3, 4, 5))}


def test_groups_are_those_of_mixed() -> None:
    for replicas in range(1, 7):
        for machines in range(replicas, 25):
            assert plan_placement(machines, replicas, "compact").groups == plan_placement(machines, replicas).groups
            if machines % replicas == 0:
                assert plan_placement(machines, replicas, "compact") == plan_placement(machines, replicas)


@pytest.mark.parametrize("machines", [*range(1, 33), 60])
def test_every_machine_hosts_as_many_copies_and_few_sets_are_distinct(machines: int) -> None:
    for replicas in range(1, machines + 1):
        placement = plan_placement(machines, replicas, "compact")
        assert_balanced(placement, machines, replicas)
        distinct = len(placement.distinct_holder_sets)
        groups, leftover = divmod(machines, replicas)
        assert distinct == continued_fraction(machines, replicas)
        assert distinct <= len(plan_placement(machines, replicas).distinct_holder_sets)
        if leftover:
            assert distinct <= groups - 1 + (replicas + leftover) // gcd(replicas, leftover)
        if leftover and leftover == replicas - 1:
            assert distinct == groups - 1 + replicas + 1


@pytest.mark.parametrize("machines", range(1, 12))
def test_compact_is_never_worse_than_mixed(machines: int) -> None:
    for replicas in range(1, machines + 1):
        for failed in range(machines + 1):
            ours = recovery_probability(plan_placement(machines, replicas, "compact"), failed)
            assert ours >= recovery_probability(plan_placement(machines, replicas), failed), (replicas, failed)


# -- can it be beaten? -------------------------------------------------------------------------------------------------


def listed(title: str) -> list[tuple[int, ...]]:
    """The rows of the table under this heading of the docs."""
    section = DOCS.read_text().split(f"### {title}\n")[1].split("\n#")[0]
    rows = [re.findall(r"\d+", line) for line in section.splitlines() if re.match(r"\|\s*\d", line)]
    return [tuple(map(int, row)) for row in rows]


def test_every_placement_up_to_eight_machines_that_beats_compact_is_in_the_docs() -> None:
    beaten = []
    for machines in range(1, 9):
        for replicas in range(1, machines + 1):
            ours = survivable_counts(machines, masks(plan_placement(machines, replicas, "compact")))
            every = [survivable_counts(machines, family) for family in balanced_placements(machines, replicas)]
            assert ours in every
            for failed in range(machines + 1):
                best = max(counts[failed] for counts in every)
                if best > ours[failed]:
                    beaten.append((machines, replicas, failed, ours[failed], best, comb(machines, failed)))
    assert beaten == [(8, 5, 6, 15, 16, 28)]
    assert not [case for case in beaten if case[1] <= 3]
    assert listed("All balanced placements, N ≤ 8") == beaten


def test_every_number_of_machines_up_to_twelve_with_fewer_distinct_sets_is_in_the_docs() -> None:
    """At k = m, the number of distinct holder sets is all that matters (Theorem 1)."""
    beaten = []
    for machines in range(1, 13):
        for replicas in range(1, machines + 1):
            ours = len(plan_placement(machines, replicas, "compact").distinct_holder_sets)
            best = fewest_distinct_sets(machines, replicas)
            assert best <= ours
            if best < ours:
                beaten.append((machines, replicas, ours, best, comb(machines, replicas)))
    assert not [case for case in beaten if case[1] <= 3]
    assert listed("At k = m, N ≤ 12") == beaten


def test_the_known_placements_are_all_enumerated() -> None:
    """Two sets of two: one group twice, or a ring; and so on. What two ways of counting find agrees."""
    assert len(balanced_placements(4, 2)) == 2
    assert len(balanced_placements(6, 2)) == 4
    assert len(balanced_placements(6, 3)) == 7
    for machines, replicas in ((5, 2), (6, 3), (7, 3)):
        fewest = min(map(len, balanced_placements(machines, replicas)))
        assert fewest == fewest_distinct_sets(machines, replicas)


@pytest.mark.parametrize(
    ("machines", "probability"),
    [(5, Fraction(6, 10)), (8, Fraction(51, 56)), (11, Fraction(159, 165))],
)
def test_compact_at_m_3(machines: int, probability: Fraction) -> None:
    assert recovery_probability(plan_placement(machines, 3, "compact"), 3) == probability
