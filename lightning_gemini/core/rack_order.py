"""Which machines of which failure domains make up each group, so that the holders of a shard do not fail together."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["rack_groups"]

Machines = tuple[int, ...]
_Gain = tuple[int, int]


def rack_groups(domains: Sequence[str], replicas: int) -> tuple[Machines, ...]:
    """Cuts machines into groups of ``replicas``, the last with the leftovers, each over as many domains as can be.

    In this order: as few owners as possible have all their holders in one domain (none, if any balanced placement
    manages that: if no domain has more than N·(m-1)/m machines); the number of domains, summed over the holder sets
    of all owners, is as large as groups and a ring allow.

    Args:
        domains: The failure domain of every machine, by machine rank.
        replicas: Copies of every shard (m).

    Returns:
        Groups of machine ranks; the last is in the order of its ring.
    """
    members = _members(domains)
    groups, leftover = divmod(len(domains), replicas)
    ring_counts = _ring_counts([len(machines) for machines in members], groups, replicas) if leftover else None
    if ring_counts is None:
        return _dealt([machine for machines in members for machine in machines], groups)
    ring = [machine for machines, count in zip(members, ring_counts, strict=True) for machine in machines[:count]]
    rest = [machine for machines, count in zip(members, ring_counts, strict=True) for machine in machines[count:]]
    return (*_dealt(rest, groups - 1), _spaced(ring))


def _members(domains: Sequence[str]) -> list[list[int]]:
    """Machines by domain, the largest domain first."""
    found: dict[str, list[int]] = {}
    for machine, domain in enumerate(domains):
        found.setdefault(domain, []).append(machine)
    return sorted(found.values(), key=len, reverse=True)


def _dealt(machines: Sequence[int], groups: int) -> tuple[Machines, ...]:
    """Deals machines, sorted by domain, like cards: a domain meets every group before it meets one twice."""
    return tuple(tuple(sorted(machines[group::groups])) for group in range(groups))


def _spaced(machines: Sequence[int]) -> Machines:
    """Orders a ring of m+q machines, sorted by domain, so that neighbours in that order are q to m places apart.

    Every m consecutive places then hold one of the two, so that a domain with two machines reaches every holder set.
    """
    half = -(-len(machines) // 2)
    ring = [0] * len(machines)
    for place, machine in enumerate(machines):
        ring[place // 2 + (half if place % 2 else 0)] = machine
    return tuple(ring)


def _ring_counts(sizes: Sequence[int], groups: int, replicas: int) -> list[int]:
    """How many machines of each domain go to the ring.

    What a domain gains by its next machine in the ring only ever falls, so that taking the best ones, one after the
    other, is optimal.
    """
    ring = replicas + sum(sizes) % replicas
    steps = [
        (_gain(size, count, groups, replicas, ring), domain, count)
        for domain, size in enumerate(sizes)
        for count in range(min(size, ring))
    ]
    steps.sort(key=lambda step: (step[0], -step[2]), reverse=True)
    counts = [0] * len(sizes)
    for _, domain, _ in steps[:ring]:
        counts[domain] += 1
    return counts


def _gain(size: int, count: int, groups: int, replicas: int, ring: int) -> _Gain:
    """What changes when a domain has one machine more in the ring and one less in the other groups."""
    before = _value(size, count, groups, replicas, ring)
    after = _value(size, count + 1, groups, replicas, ring)
    return after[0] - before[0], after[1] - before[1]


def _value(size: int, count: int, groups: int, replicas: int, ring: int) -> _Gain:
    """(minus the owners whose holders are all of this domain, owners with a holder of this domain)."""
    others = size - count
    alone = replicas * max(0, others - (groups - 1) * (replicas - 1))
    alone += {0: ring, 1: ring - replicas}.get(ring - count, 0)
    reached = replicas * min(others, groups - 1)
    reached += {0: 0, 1: replicas}.get(count, ring)
    return -alone, reached
