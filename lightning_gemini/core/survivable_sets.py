"""Counts the sets of lost units that are survived: those that contain no fatal set as a whole.

A unit is a machine, or a failure domain that is lost as a whole; a fatal set holds every copy of some shard. Units that
share no fatal set are independent, so that the counts of the parts multiply like polynomials. Groups and rings have
closed forms; any other part is counted unit by unit, merging all cases that agree on which fatal sets are still open.
Where there are but few sets of lost units at all, they are looked at one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from lightning_gemini.errors import PlacementError

__all__ = ["TooManyCasesError", "survivable_count"]

FatalSet = frozenset[int]
_Count = Callable[[int], int]  # lost units -> survivable sets of that many

MOST_CASES = 500_000


class TooManyCasesError(PlacementError):
    """An exact count would take too long."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Units that are independent of all others.

    Attributes:
        units: How many.
        count: Survivable sets by number of lost units.
    """

    units: int
    count: _Count


def survivable_count(order: Sequence[int], fatal: Collection[FatalSet], lost: int) -> int:
    """Counts the sets of ``lost`` units that contain none of the ``fatal`` sets.

    Args:
        order: All units. Neighbours in a ring must be neighbours here, or the ring is not known as one.
        fatal: Sets of units that must not be lost together.
        lost: Number of lost units.

    Raises:
        TooManyCasesError: If neither a closed form nor `MOST_CASES` cases suffice.
    """
    sets = _minimal(fatal)
    if lost < min(map(len, sets), default=0):
        return comb(len(order), lost)
    try:
        parts = sorted(_parts(order, sets, lost), key=lambda part: part.units)
    except TooManyCasesError:
        if comb(len(order), lost) * len(sets) > MOST_CASES:
            raise
        return sum(not any(one.issubset(units) for one in sets) for units in combinations(order, lost))
    product = [1]
    for part in parts[:-1]:
        terms = [part.count(k) for k in range(min(part.units, lost) + 1)]
        product = _multiplied(product, terms, lost)
    largest = parts[-1].count
    return sum(ways * largest(lost - k) for k, ways in enumerate(product) if ways)


def _multiplied(left: Sequence[int], right: Sequence[int], degree: int) -> list[int]:
    product = [0] * min(len(left) + len(right) - 1, degree + 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right[: len(product) - i]):
            product[i + j] += a * b
    return product


def _minimal(fatal: Collection[FatalSet]) -> set[FatalSet]:
    """A set that contains another fatal set says nothing new."""
    if len(set(map(len, fatal))) <= 1:
        return set(fatal)
    kept: set[FatalSet] = set()
    for one in sorted(set(fatal), key=len):
        if not any(other <= one for other in kept):
            kept.add(one)
    return kept


def _parts(order: Sequence[int], fatal: set[FatalSet], lost: int) -> Iterable[_Part]:
    groups: Counter[int] = Counter()
    free = len(order)
    for units, sets in _components(order, fatal):
        free -= len(units)
        if len(sets) == 1:
            groups[len(units)] += 1
        elif (window := _ring_window(units, sets)) is not None:
            yield _Part(len(units), _ring_count(len(units), window))
        else:
            yield _Part(len(units), _cases_count(units, sets, lost))
    for size, number in groups.items():
        yield _Part(size * number, _groups_count(size, number))
    yield _Part(free, lambda k: comb(free, k))


def _components(order: Sequence[int], fatal: set[FatalSet]) -> list[tuple[list[int], list[FatalSet]]]:
    """Units that fatal sets tie together, each with these sets; units that nothing depends on are left out."""
    leader: dict[int, int] = {unit: unit for one in fatal for unit in one}

    def find(unit: int) -> int:
        while leader[unit] != unit:
            leader[unit] = unit = leader[leader[unit]]
        return unit

    for one in fatal:
        first, *others = one
        for unit in others:
            leader[find(unit)] = find(first)
    found: dict[int, tuple[list[int], list[FatalSet]]] = {}
    for unit in order:
        if unit in leader:
            found.setdefault(find(unit), ([], []))[0].append(unit)
    for one in fatal:
        found[find(next(iter(one)))][1].append(one)
    return list(found.values())


# -- closed forms ------------------------------------------------------------------------------------------------------


def _groups_count(size: int, number: int) -> _Count:
    """Groups of which none is lost as a whole: inclusion and exclusion over those that are."""
    return lambda k: sum(
        (-1 if j % 2 else 1) * comb(number, j) * comb((number - j) * size, k - j * size)
        for j in range(min(number, k // size) + 1)
    )


def _ring_window(units: Sequence[int], sets: Sequence[FatalSet]) -> int | None:
    """How many neighbours each fatal set has, if these are all windows of a ring."""
    window = len(sets[0])
    if len(sets) != len(units) or window >= len(units):
        return None
    doubled = [*units, *units]
    windows = {frozenset(doubled[start : start + window]) for start in range(len(units))}
    return window if windows == set(sets) else None


def _ring_count(units: int, window: int) -> _Count:
    """Rings in which no ``window`` neighbours are lost: runs of fewer lost ones between those that are left."""

    def count(lost: int) -> int:
        left = units - lost
        if left <= 0:
            return 0
        runs = sum(
            (-1 if j % 2 else 1) * comb(left, j) * comb(lost - j * window + left - 1, left - 1)
            for j in range(min(left, lost // window) + 1)
        )
        return units * runs // left  # each ring is counted once for every unit that is left

    return count


# -- anything else -----------------------------------------------------------------------------------------------------


def _cases_count(units: Sequence[int], sets: Sequence[FatalSet], lost: int) -> _Count:
    twins: dict[int, int] = {}  # units of the same fatal sets count as one: the bit mask of these sets -> how many
    for unit in units:
        member = sum(1 << index for index, one in enumerate(sets) if unit in one)
        twins[member] = twins.get(member, 0) + 1
    degree = min(lost, len(units))
    as_given = list(twins.items())
    busiest_first = sorted(as_given, key=lambda item: item[0].bit_count(), reverse=True)
    counts = _counted(busiest_first, degree) or _counted(as_given, degree)  # the first suits blocks, the second chains
    if counts is None:
        raise TooManyCasesError(
            f"the exact count for {lost} lost of {len(units)} machines that {len(sets)} holder sets tie together has "
            f"more than {MOST_CASES} cases: estimate it (recovery_odds), or ask for fewer failures"
        )
    return lambda k: counts[k] if k <= degree else 0


def _counted(twins: Sequence[tuple[int, int]], degree: int) -> list[int] | None:
    """Survivable sets by number of lost units; ``None`` if there are too many cases.

    A case is the bit mask of the fatal sets that are open and have a unit left already.
    """
    last = {index: at for at, (member, _) in enumerate(twins) for index in _bits(member)}
    cases: dict[int, list[int]] = {0: [1] + [0] * degree}
    work = 0
    for at, (member, number) in enumerate(twins):
        done = sum(1 << index for index in _bits(member) if last[index] == at)
        some_left = [comb(number, k) for k in range(number)]
        merged: dict[int, list[int]] = {}
        for served, ways in cases.items():
            for after, terms in ((served | member, some_left), (served, [0] * number + [1])):
                if after & done != done:
                    continue  # a fatal set was lost as a whole
                total = merged.setdefault(after & ~done, [0] * (degree + 1))
                for k, amount in enumerate(_multiplied(ways, terms, degree)):
                    total[k] += amount
        cases = merged
        work += len(cases) * (degree + 1)
        if work > MOST_CASES:
            return None
    return cases.get(0, [0] * (degree + 1))


def _bits(mask: int) -> list[int]:
    return [index for index in range(mask.bit_length()) if mask >> index & 1]
