"""What the interference experiment measured: one row for every scheme and link speed, read from its `result.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BUDGET = 0.01
"""What a checkpoint every iteration may cost, as a part of an iteration."""


class UnreadableRowError(ValueError):
    """A row does not say what the figures need."""


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme at one link speed.

    Attributes:
        scheme: ``none``, ``eager``, ``blocking``, ``naive``, ``unpipelined`` or ``interleaved``.
        link_mbit: Speed of every machine's link, Mbit/s.
        fits: Whether the checkpoint fits the idle time at that speed.
        iteration_s: Median duration of an iteration.
        iteration_low_s: Lower end of its spread; ``iteration_high_s``: the upper end.
        overhead: How much longer than under ``none`` an iteration takes, as a part.
        overhead_low: Lower end of its confidence interval, ``overhead_high`` the upper one; ``None`` if not given.
        idle_s: Time of an iteration without training communication; ``None`` if not measured.
        checkpoint_s: From taking a version until every holder has it; ``None`` under ``none``.
        peak_buffer_bytes: The most bytes under way to a holder at once.
    """

    scheme: str
    link_mbit: float
    fits: bool
    iteration_s: float
    iteration_low_s: float
    iteration_high_s: float
    overhead: float
    overhead_low: float | None
    overhead_high: float | None
    idle_s: float | None
    checkpoint_s: float | None
    peak_buffer_bytes: float | None


@dataclass(frozen=True, slots=True)
class BreakPoint:
    """Between which link speeds a scheme stops being free.

    Attributes:
        within_mbit: The slowest speed at which it, and at all faster ones, costs no more than the budget.
        beyond_mbit: The next slower speed measured.
    """

    within_mbit: float
    beyond_mbit: float


def read_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Reads the rows of a result.

    Raises:
        UnreadableRowError: There is none, a field is missing or no number, or a scheme is there twice at one speed.
    """
    if not rows:
        raise UnreadableRowError("expected rows of schemes and link speeds, found none: run the experiment to its end")
    read = [_row(index, row) for index, row in enumerate(rows)]
    seen: set[tuple[str, float]] = set()
    for row in read:
        if (row.scheme, row.link_mbit) in seen:
            raise UnreadableRowError(
                f"expected one row a scheme and link speed, found two of {row.scheme!r} at {row.link_mbit:g} Mbit/s: "
                "draw one run at a time"
            )
        seen.add((row.scheme, row.link_mbit))
    return read


def of_scheme(rows: Sequence[Row], scheme: str) -> list[Row]:
    """The rows of one scheme, the fastest link first."""
    return sorted((row for row in rows if row.scheme == scheme), key=lambda row: -row.link_mbit)


def break_point(rows: Sequence[Row], scheme: str = "interleaved", budget: float = BUDGET) -> BreakPoint | None:
    """Finds the speed below which a scheme costs more than the budget; ``None`` if no two speeds enclose it."""
    ordered = of_scheme(rows, scheme)
    beyond = next((index for index, row in enumerate(ordered) if row.overhead > budget), None)
    return BreakPoint(ordered[beyond - 1].link_mbit, ordered[beyond].link_mbit) if beyond else None


def _row(index: int, row: Mapping[str, Any]) -> Row:
    where = f"row {index} ({row.get('scheme')!r} at {row.get('link_mbit')} Mbit/s)"
    read = Row(
        scheme=_field(row, "scheme", where, str),
        link_mbit=_number(row, "link_mbit", where, above=0),
        fits=_field(row, "fits", where, bool),
        iteration_s=_number(row, "iteration_s_median", where, above=0),
        iteration_low_s=_number(row, "iteration_s_low", where, above=0),
        iteration_high_s=_number(row, "iteration_s_high", where, above=0),
        overhead=_number(row, "overhead", where, above=-1),
        overhead_low=_number_or_none(row, "overhead_low", where),
        overhead_high=_number_or_none(row, "overhead_high", where),
        idle_s=_number_or_none(row, "idle_s", where),
        checkpoint_s=_number_or_none(row, "checkpoint_s", where),
        peak_buffer_bytes=_number_or_none(row, "peak_buffer_bytes", where),
    )
    if not read.iteration_low_s <= read.iteration_s <= read.iteration_high_s:
        raise UnreadableRowError(
            f"{where}: expected iteration_s_low <= iteration_s_median <= iteration_s_high, found "
            f"{read.iteration_low_s}, {read.iteration_s}, {read.iteration_high_s}: mend what wrote the row"
        )
    return read


def _number_or_none(row: Mapping[str, Any], name: str, where: str) -> float | None:
    return None if row.get(name) is None else _number(row, name, where, above=-math.inf)


def _number(row: Mapping[str, Any], name: str, where: str, *, above: float) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise _unreadable(where, name, "a finite number" if above == -math.inf else f"a number above {above}", row)
    return float(value)


def _field(row: Mapping[str, Any], name: str, where: str, kind: type) -> Any:
    if not isinstance(row.get(name), kind):
        raise _unreadable(where, name, {str: "a text", bool: "true or false"}[kind], row)
    return row[name]


def _unreadable(where: str, name: str, expected: str, row: Mapping[str, Any]) -> UnreadableRowError:
    found = repr(row[name]) if name in row else "nothing"
    return UnreadableRowError(f"{where}: expected {expected} as {name!r}, found {found}: mend what wrote the row")
