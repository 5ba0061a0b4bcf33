from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from lightning_gemini.core.placement import Placement, plan_placement
from lightning_gemini.errors import PlacementError
from tests.core.balanced_placements import balanced_placements


def partitions(total: int, largest: int | None = None) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as a sum of domain sizes, largest first."""
    if total == 0:
        yield ()
    for first in range(min(total, largest or total), 0, -1):
        yield from ((first, *rest) for rest in partitions(total - first, first))


def labels(sizes: Sequence[int]) -> list[str]:
    """Machines of domains of these sizes; dealt, so that neighbours are of different domains where possible."""
    left = Counter({chr(ord("a") + domain): size for domain, size in enumerate(sizes)})
    dealt = []
    while +left:
        dealt += sorted(+left)
        left -= Counter(dict.fromkeys(+left, 1))
    return dealt


def arrangements(left: Counter[str]) -> Iterator[tuple[str, ...]]:
    """Every order of these labels."""
    if not +left:
        yield ()
    for label in +left:
        yield from ((label, *rest) for rest in arrangements(left - Counter([label])))


def alone(placement: Placement, domains: Sequence[str]) -> int:
    """Owners whose holders are all of one domain."""
    return sum(len({domains[machine] for machine in holders}) == 1 for holders in placement.holder_sets)


def reach(placement: Placement, domains: Sequence[str]) -> int:
    """Distinct domains among the holders, summed over the owners."""
    return sum(len({domains[machine] for machine in holders}) for holders in placement.holder_sets)


def test_groups_span_racks() -> None:
    placement = plan_placement(6, 2, "rack", ["a", "a", "a", "b", "b", "b"])
    assert placement.groups == ((0, 3), (1, 4), (2, 5))
    placement = plan_placement(6, 3, "rack", ["a", "a", "b", "b", "c", "c"])
    assert placement.groups == ((0, 2, 4), (1, 3, 5))


def test_ring_of_the_leftovers_spans_racks() -> None:
    placement = plan_placement(7, 3, "rack", list("aaabbcc"))
    domains = "aaabbcc"
    assert [len(group) for group in placement.groups] == [3, 4]
    assert alone(placement, domains) == 0
    assert {frozenset(domains[machine] for machine in placement.groups[0])} == {frozenset("abc")}


@pytest.mark.parametrize("machines", range(1, 13))
def test_as_few_shards_as_possible_depend_on_one_domain(machines: int) -> None:
    """A machine hosts m copies, so those outside the largest domain can protect m owners each, and no more."""
    for sizes in partitions(machines):
        domains = labels(sizes)
        for replicas in range(2, machines + 1):
            placement = plan_placement(machines, replicas, "rack", domains)
            outside = machines - max(sizes)
            assert alone(placement, domains) == max(0, machines - replicas * outside), (sizes, replicas)


@pytest.mark.parametrize("machines", range(2, 8))
def test_a_lost_domain_is_survived_whenever_any_balanced_placement_survives_it(machines: int) -> None:
    for replicas in range(2, machines + 1):
        families = balanced_placements(machines, replicas)
        for sizes in partitions(machines):
            domains = labels(sizes)
            ours = alone(plan_placement(machines, replicas, "rack", domains), domains) == 0
            assert ours == any(_survives(family, sizes) for family in families), (machines, replicas, sizes)


def _survives(family: frozenset[int], sizes: Sequence[int]) -> bool:
    """Whether some assignment of machines to domains of these sizes leaves no holder set within one domain."""
    machines = sum(sizes)

    def place(machine: int, left: tuple[int, ...], domains: tuple[int, ...]) -> bool:
        if machine == machines:
            return all(holders & ~domain for holders in family for domain in domains)
        for index in range(len(sizes)):
            grown = domains[index] | 1 << machine
            if left[index] and not any(holders & ~grown == 0 for holders in family):
                rest = (*left[:index], left[index] - 1, *left[index + 1 :])
                if place(machine + 1, rest, (*domains[:index], grown, *domains[index + 1 :])):
                    return True
        return False

    return place(0, tuple(sizes), (0,) * len(sizes))


@pytest.mark.parametrize("machines", range(2, 7))
def test_no_other_order_of_groups_and_ring_spans_more_domains(machines: int) -> None:
    for replicas in range(2, machines + 1):
        plain = plan_placement(machines, replicas, "mixed")
        for sizes in partitions(machines):
            names = labels(sizes)
            orders = arrangements(Counter(names))
            best = max((-alone(plain, order), reach(plain, order)) for order in orders)
            ours = plan_placement(machines, replicas, "rack", names)
            assert (-alone(ours, names), reach(ours, names)) == best, (machines, replicas, sizes)


def test_distinct_domains_everywhere_if_no_domain_has_more_machines_than_there_are_groups() -> None:
    domains = [f"rack{machine // 4}" for machine in range(32)]
    placement = plan_placement(32, 4, "rack", domains)
    assert all(len({domains[machine] for machine in holders}) == 4 for holders in placement.holder_sets)


def test_domains_do_not_change_the_other_placements() -> None:
    assert plan_placement(5, 2, "mixed", list("aabbc")) == plan_placement(5, 2, "mixed")


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (None, "needs the failure domain of every machine and got none: give domains"),
        (["a", "b", "c"], "got 3 for 4 machines: repeat the label"),
        (["a"] * 5, "got 5 for 4 machines"),
        (["a", "", "b", ""], "those of machines 1, 3 are unknown: set LIGHTNING_GEMINI_DOMAIN"),
    ],
)
def test_missing_domains_are_refused_with_the_remedy(domains: list[str] | None, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        plan_placement(4, 2, "rack", domains)
