"""Balanced holder sets of which few are distinct: the fewer there are, the fewer failures hit one of them exactly."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["compact_sets"]

Machines = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Level:
    """One step of the construction: ``base`` is as large as a holder set, ``extra`` are the machines left over."""

    base: Machines
    extra: Machines


def compact_sets(machines: Machines, replicas: int) -> dict[int, Machines]:
    """Gives every machine ``replicas`` holders, itself among them, so that every machine hosts ``replicas`` copies.

    Groups of m machines are cut off while 2m or more are left. Of the last m+q, the first m (A) and the other q (B):
    q owners of A use A itself, all other sets are B and m-q machines of A. Which of A is the same problem again, on m
    machines with sets of m-q; its sets belong to the owners of A, and the q of these that use A leave theirs to B.
    As Euclid's algorithm on (m+q, m), it ends with as many distinct sets as the continued fraction of (m+q)/m adds up
    to: m+1 for q = m-1, where a ring has 2m-1, and never more than (m+q)/gcd(m, q), which a ring of cells has.

    Args:
        machines: Machines to place, at least ``replicas``.
        replicas: Machines in every holder set (m).

    Returns:
        Holders by owner, in no particular order.
    """
    levels: list[_Level] = []
    slots: dict[int, tuple[Machines, int]] = {}  # owner -> the machines added at a level, and that level
    rest, size = machines, replicas
    while True:
        while len(rest) >= 2 * size:
            _assign(slots, rest[:size], len(levels))
            rest = rest[size:]
        if len(rest) == size:
            _assign(slots, rest, len(levels))
            break
        levels.append(_Level(base := rest[:size], extra := rest[size:]))
        rest, size = base, size - len(extra)
    for depth, level in reversed(list(enumerate(levels))):
        for owner, other in zip(level.base, level.extra, strict=False):
            slots[other], slots[owner] = slots[owner], (level.base, depth)
    return _joined(slots, levels)


def _assign(slots: dict[int, tuple[Machines, int]], block: Machines, depth: int) -> None:
    slots.update((owner, (block, depth)) for owner in block)


def _joined(slots: dict[int, tuple[Machines, int]], levels: list[_Level]) -> dict[int, Machines]:
    """A set chosen at some depth contains the extra machines of all levels above."""
    above: list[Machines] = [()]
    for level in levels:
        above.append(above[-1] + level.extra)
    return {owner: above[depth] + block for owner, (block, depth) in slots.items()}
