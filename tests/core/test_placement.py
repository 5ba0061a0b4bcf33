from __future__ import annotations

import json
from dataclasses import asdict
from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.core.placement import (
    STRATEGIES,
    Placement,
    placement_from_json,
    placement_to_json,
    plan_placement,
)
from lightning_gemini.errors import PlacementError, ProtocolError


def one_based(groups: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    return [[machine + 1 for machine in group] for group in groups]


@st.composite
def placements(draw: st.DrawFn, max_machines: int = 24) -> tuple[Placement, int, int, str]:
    strategy = draw(st.sampled_from(STRATEGIES))
    replicas = draw(st.integers(1, 6))
    if strategy == "group":
        machines = replicas * draw(st.integers(1, max_machines // replicas))
    else:
        machines = draw(st.integers(replicas, max_machines))
    domains = draw(st.lists(st.sampled_from("abcde"), min_size=machines, max_size=machines))
    return plan_placement(machines, replicas, strategy, domains), machines, replicas, strategy


def survivors(placement: Placement, machines: int, failures: int) -> int:
    """Counts, by enumeration, the sets of ``failures`` lost machines that memory survives."""
    return sum(placement.recoverable(set(failed)) for failed in combinations(range(machines), failures))


@pytest.mark.parametrize(
    ("machines", "replicas", "groups"),
    [
        (4, 2, [[1, 2], [3, 4]]),
        (5, 2, [[1, 2], [3, 4, 5]]),
        (7, 3, [[1, 2, 3], [4, 5, 6, 7]]),
        (8, 3, [[1, 2, 3], [4, 5, 6, 7, 8]]),
        (3, 2, [[1, 2, 3]]),
        (1, 1, [[1]]),
        (3, 1, [[1], [2], [3]]),
        (3, 3, [[1, 2, 3]]),
    ],
)
def test_mixed_forms_the_groups_of_algorithm_1(machines: int, replicas: int, groups: list[list[int]]) -> None:
    assert one_based(plan_placement(machines, replicas).groups) == groups


def test_last_group_with_leftovers_is_a_ring() -> None:
    placement = plan_placement(5, 2)
    assert placement.holder_sets == ((0, 1), (1, 0), (2, 3), (3, 4), (4, 2))
    assert placement.hosted_by(2) == (2, 4)
    assert placement.hosted_by(0) == (0, 1)


def test_a_healthy_machine_in_every_group_is_not_enough_in_a_ring() -> None:
    placement = plan_placement(5, 2)
    assert not placement.recoverable({2, 3})  # machines 3 and 4, counted from 1
    assert placement.recoverable({0, 2})


def test_ring_sends_to_the_next_machines() -> None:
    placement = plan_placement(4, 3, "ring")
    assert placement.groups == ((0, 1, 2, 3),)
    assert placement.holder_sets == ((0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1))


def test_group_equals_mixed_where_replicas_divides_the_machines() -> None:
    for replicas in range(1, 5):
        for machines in range(replicas, 17, replicas):
            assert plan_placement(machines, replicas, "group") == plan_placement(machines, replicas, "mixed")


@given(placements())
def test_every_machine_hosts_as_many_copies_as_it_sends(case: tuple[Placement, int, int, str]) -> None:
    placement, machines, replicas, strategy = case
    assert sorted(machine for group in placement.groups for machine in group) == list(range(machines))
    assert len(placement.holder_sets) == machines
    group_of = {machine: group for group in placement.groups for machine in group}
    for owner in range(machines):
        holders = placement.holders(owner)
        assert holders[0] == owner
        assert len(set(holders)) == len(holders) == replicas
        assert set(holders) <= set(group_of[owner])
        hosted = placement.hosted_by(owner)
        assert hosted[0] == owner
        assert len(set(hosted)) == len(hosted) == replicas  # balanced memory
        assert all(owner in placement.holders(other) for other in hosted)
    if strategy == "ring":
        assert len(placement.groups) == 1
    else:
        assert [len(group) for group in placement.groups[:-1]] == [replicas] * (machines // replicas - 1)
        assert len(placement.groups[-1]) == replicas + machines % replicas


@given(placements())
def test_number_of_holder_sets_is_that_of_theorem_1(case: tuple[Placement, int, int, str]) -> None:
    placement, machines, replicas, strategy = case
    groups, leftover = divmod(machines, replicas)
    distinct = len(placement.distinct_holder_sets)
    if strategy == "ring":
        assert distinct == (machines if machines > replicas else 1)
    elif strategy == "compact":
        assert distinct <= (replicas + leftover + groups - 1 if leftover else groups)
    else:
        assert distinct == (replicas + leftover + groups - 1 if leftover else groups)


@given(placements(), st.sets(st.integers(0, 23)))
def test_losing_more_machines_never_helps(case: tuple[Placement, int, int, str], failed: set[int]) -> None:
    placement, machines, replicas, _ = case
    if len(failed & set(range(machines))) < replicas:
        assert placement.recoverable(failed)
    if not placement.recoverable(failed):
        assert all(not placement.recoverable(failed | {machine}) for machine in range(machines))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("machines", range(1, 9))
def test_recoverable_for_every_set_of_lost_machines(machines: int, strategy: str) -> None:
    for replicas in range(1, machines + 1):
        if strategy == "group" and machines % replicas:
            continue
        placement = plan_placement(machines, replicas, strategy, [str(machine % 3) for machine in range(machines)])
        for failures in range(machines + 1):
            for failed in combinations(range(machines), failures):
                # What is left, computed from the receiving side: the shards that the live machines hold.
                alive = set(range(machines)) - set(failed)
                held = {owner for machine in alive for owner in placement.hosted_by(machine)}
                assert placement.recoverable(set(failed)) == (held == set(range(machines)))


@pytest.mark.parametrize(
    ("machines", "replicas", "failures", "group", "ring"),
    [
        (16, 2, 2, Fraction(112, 120), Fraction(104, 120)),
        (16, 2, 3, Fraction(448, 560), Fraction(352, 560)),
        (16, 2, 4, Fraction(1120, 1820), Fraction(660, 1820)),
        (16, 4, 4, Fraction(1816, 1820), Fraction(1804, 1820)),
        (12, 3, 3, Fraction(216, 220), Fraction(208, 220)),
        (8, 2, 2, Fraction(24, 28), Fraction(20, 28)),
        (4, 2, 2, Fraction(4, 6), Fraction(2, 6)),
    ],
)
def test_probability_of_recovery_from_memory(
    machines: int, replicas: int, failures: int, group: Fraction, ring: Fraction
) -> None:
    cases = comb(machines, failures)
    assert Fraction(survivors(plan_placement(machines, replicas, "group"), machines, failures), cases) == group
    assert Fraction(survivors(plan_placement(machines, replicas, "ring"), machines, failures), cases) == ring


@pytest.mark.parametrize(
    ("machines", "replicas", "failures", "probability"),
    [
        (5, 2, 2, 0.6000),
        (7, 2, 2, 0.7619),
        (9, 2, 2, 0.8333),
        (11, 2, 2, 0.8727),
        (4, 3, 3, 0.0),
        (5, 3, 3, 0.5000),
        (7, 3, 3, 0.8571),
        (8, 3, 3, 0.8929),
        (10, 3, 3, 0.9500),
        (11, 3, 3, 0.9576),
        (7, 2, 3, 0.3429),
        (9, 2, 3, 0.5238),
        (11, 2, 3, 0.6303),
        (7, 3, 4, 0.5143),
        (8, 3, 4, 0.6429),
        (10, 3, 4, 0.8143),
        (11, 3, 4, 0.8455),
    ],
)
def test_probability_of_recovery_of_the_mixed_placement(
    machines: int, replicas: int, failures: int, probability: float
) -> None:
    survived = survivors(plan_placement(machines, replicas), machines, failures)
    assert survived / comb(machines, failures) == pytest.approx(probability, abs=5e-5)


@pytest.mark.parametrize(
    ("machines", "replicas", "strategy", "remedy"),
    [
        (2, 3, "mixed", "set replicas to 2 or less, or add 1 machine"),
        (4, 0, "mixed", "use replicas=1 .* 2 or more"),
        (4, -1, "ring", "use replicas=1"),
        (0, 1, "mixed", "start the job with 1 or more"),
        (5, 2, "group", "use placement='mixed', or 4 or 6 machines"),
        (4, 2, "star", "must be one of mixed, group, ring, compact, rack, got 'star'"),
        (4, 2, "rack", "give domains, one label a machine, or use placement='mixed'"),
    ],
)
def test_impossible_numbers_are_refused_with_the_remedy(
    machines: int, replicas: int, strategy: str, remedy: str
) -> None:
    with pytest.raises(PlacementError, match=remedy):
        plan_placement(machines, replicas, strategy)
    with pytest.raises(ValueError, match=remedy):
        plan_placement(machines, replicas, strategy)


@given(placements())
def test_json_round_trip(case: tuple[Placement, int, int, str]) -> None:
    placement = case[0]
    assert placement_from_json(json.loads(json.dumps(placement_to_json(placement)))) == placement
    assert placement_from_json(asdict(placement)) == placement


@pytest.mark.parametrize("data", [{}, {"groups": [[0]]}, {"groups": 3, "holder_sets": []}, {"groups": [["a"]]}, []])
def test_what_is_no_placement_is_refused(data: object) -> None:
    with pytest.raises(ProtocolError):
        placement_from_json(data)  # type: ignore[arg-type]
