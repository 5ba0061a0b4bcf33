"""Every balanced placement there is, up to the names of machines: to know what no placement can beat.

A placement is balanced if every machine hosts exactly m copies. Its holder sets, counted as often as they occur, are
then N sets of m machines that cover every machine m times; and any such sets can be dealt to owners that are among
them, because a regular bipartite graph has a perfect matching. So that is what is enumerated: sets, as bit masks, one
after the other, with cases that differ only in the names of machines merged by a canonical form.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from itertools import combinations

Family = tuple[tuple[int, int], ...]  # (bit mask of machines, how many owners use it), sorted


@functools.cache
def balanced_placements(machines: int, replicas: int) -> frozenset[frozenset[int]]:
    """The distinct holder sets (bit masks) of every balanced placement, one of each kind."""
    if 2 * replicas > machines:  # the complements of its sets are the balanced placements of the others
        everyone = (1 << machines) - 1
        if replicas == machines:
            return frozenset([frozenset([everyone])])
        others = balanced_placements(machines, machines - replicas)
        return frozenset(frozenset(everyone ^ holders for holders in family) for family in others)
    if replicas == 1:
        return frozenset([frozenset(1 << one for one in range(machines))])
    families: set[Family] = {()}
    for placed in range(machines):
        grown = {new for family in families for new in _grown(family, machines, replicas, machines - placed)}
        families = {_canonical(family, machines) for family in grown}
    return frozenset(frozenset(holders for holders, _ in family) for family in families)


def survivable_counts(machines: int, family: Iterable[int]) -> list[int]:
    """How many sets of 0, 1, … lost machines hit no holder set as a whole; looked at one by one."""
    counts = [0] * (machines + 1)
    for lost in range(1 << machines):
        if all(holders & ~lost for holders in family):
            counts[lost.bit_count()] += 1
    return counts


def fewest_distinct_sets(machines: int, replicas: int) -> int:
    """The fewest distinct holder sets of any balanced placement.

    How many copies each machine can still take decides what can follow, whoever the machines are; and some set contains
    the machine that can take most.
    """

    @functools.cache
    def fewest(capacities: tuple[int, ...]) -> float:
        if not capacities[0]:
            return 0
        owners = sum(capacities) // replicas
        if capacities[0] > owners:
            return float("inf")
        return min(1 + fewest(rest) for rest in _after_one_set(capacities, replicas))

    return int(fewest((replicas,) * machines))


def _after_one_set(capacities: tuple[int, ...], replicas: int) -> Iterator[tuple[int, ...]]:
    used = [machine for machine, capacity in enumerate(capacities) if capacity and machine]
    chosen = {tuple(capacities[machine] for machine in others): others for others in combinations(used, replicas - 1)}
    for others in chosen.values():
        for owners in range(1, min(capacities[machine] for machine in (0, *others)) + 1):
            rest = list(capacities)
            for machine in (0, *others):
                rest[machine] -= owners
            yield tuple(sorted(rest, reverse=True))


def _grown(family: Family, machines: int, replicas: int, owners_left: int) -> Iterator[Family]:
    """The family with one set more: one that contains the machine that is almost done, and all that must be in it."""
    needs = [replicas - sum(owners for holders, owners in family if holders >> one & 1) for one in range(machines)]
    if max(needs) > owners_left:
        return
    least = min((need, one) for one, need in enumerate(needs) if need)[1]
    forced = {one for one in range(machines) if needs[one] == owners_left} | {least}
    if len(forced) > replicas:
        return
    free = [one for one in range(machines) if needs[one] and one not in forced]
    twins = [tuple(holders >> one & 1 for holders, _ in family) for one in range(machines)]
    choices = combinations(free, replicas - len(forced))
    for others in {tuple(sorted(twins[one] for one in others)): others for others in choices}.values():
        holders = sum(1 << one for one in (*forced, *others))
        counted = dict(family)
        counted[holders] = counted.get(holders, 0) + 1
        yield tuple(sorted(counted.items()))


def _canonical(family: Family, machines: int) -> Family:
    """The same for families that differ only in the names of machines.

    Machines are told apart by the sets they are in, again and again; where that ends, each of the first undecided ones
    is tried as the first, and the smallest outcome counts.
    """
    members = [[one for one in range(machines) if holders >> one & 1] for holders, _ in family]
    places = [[at for at, (holders, _) in enumerate(family) if holders >> one & 1] for one in range(machines)]

    def refined(colours: list[int]) -> list[int]:
        while True:
            sets = [(family[at][1], *sorted([colours[one] for one in members[at]])) for at in range(len(family))]
            signs = [(colours[one], *sorted([sets[at] for at in places[one]])) for one in range(machines)]
            order = {sign: number for number, sign in enumerate(sorted(set(signs)))}
            new = [order[sign] for sign in signs]
            if len(set(new)) == len(set(colours)):
                return new
            colours = new

    def smallest(colours: list[int]) -> Family:
        colours = refined(colours)
        first = min((colour for colour in colours if colours.count(colour) > 1), default=None)
        if first is None:
            rank = {one: sorted(colours).index(colours[one]) for one in range(machines)}
            renamed = (sum(1 << rank[one] for one in members[at]) for at in range(len(family)))
            return tuple(sorted(zip(renamed, (owners for _, owners in family), strict=True)))
        twins = {tuple(places[one]): one for one in range(machines) if colours[one] == first}
        return min(smallest([2 * c - (other == one) for other, c in enumerate(colours)]) for one in twins.values())

    return smallest([0] * machines)
