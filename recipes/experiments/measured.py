"""What a run of alternating schemes measured: a row for each scheme, with the cost over `none` and its uncertainty."""

from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REFERENCE = "none"
LOW, HIGH = 0.1, 0.9
"""Quantiles that a row gives as the spread of its iterations."""
CONFIDENCE = 0.95
_RESAMPLES = 2000

Rounds = Mapping[int, Sequence[float]]
"""Seconds of the iterations of one scheme, by round."""


class IncompleteError(Exception):
    """A run did not write what a row needs."""


def measured_rows(folder: Path, link_mbit: float, seed: int) -> list[dict[str, Any]]:
    """Reads a run directory.

    Args:
        folder: Where `interference_training.py` wrote.
        link_mbit: Speed of the links, for the rows.
        seed: Of the resampling.

    Raises:
        IncompleteError: Iterations of `none`, or the plan, are missing.
    """
    by_scheme: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    versions: dict[str, set[int]] = defaultdict(set)
    for line in read_lines(folder / "iterations.jsonl"):
        if line["counted"]:
            by_scheme[line["scheme"]][line["round"]].append(line["seconds"])
            versions[line["scheme"]].add(line["version"])
    plans = read_lines(folder / "plans.jsonl")
    if REFERENCE not in by_scheme or not plans:
        raise IncompleteError(f"{folder}: expected iterations of {REFERENCE!r} and a plan; see rank0.log there")
    traces, costs = read_lines(folder / "traces.jsonl"), _costs(folder)
    shared = {
        "link_mbit": link_mbit,
        "fits": plans[-1]["overrun_s"] == 0.0,
        "idle_s": _median(line["idle_s"] for line in traces if line["scheme"] == REFERENCE),
    }
    return [
        {
            **row(scheme, rounds, by_scheme[REFERENCE], seed),
            **shared,
            **_traffic(costs, versions[scheme]),
            "communication_s": _median(line["busy_s"] for line in traces if line["scheme"] == scheme),
        }
        for scheme, rounds in by_scheme.items()
    ]


def overhead(rounds: Rounds, reference: Rounds, seed: int) -> tuple[float, float, float]:
    """How much longer the median iteration is than the reference's, as a part of it, and the interval of that.

    By a bootstrap over rounds: the iterations of a block, and the blocks of a round, are not independent of each
    other; rounds are as independent as can be.
    """
    draw, both = random.Random(seed), sorted(set(rounds) & set(reference))
    found = sorted(_ratio(rounds, reference, draw.choices(both, k=len(both))) for _ in range(_RESAMPLES))
    tail = round((1 - CONFIDENCE) / 2 * _RESAMPLES)
    return _ratio(rounds, reference, both), found[tail], found[-1 - tail]


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which that part of the values lies."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def row(scheme: str, rounds: Rounds, reference: Rounds, seed: int) -> dict[str, Any]:
    """What iterations of a scheme took, and how much longer than those of the reference."""
    seconds = [value for block in rounds.values() for value in block]
    middle, low, high = overhead(rounds, reference, seed)
    return {
        "scheme": scheme,
        "iterations": len(seconds),
        "iteration_s_median": statistics.median(seconds),
        "iteration_s_low": quantile(seconds, LOW),
        "iteration_s_high": quantile(seconds, HIGH),
        "overhead": middle,
        "overhead_low": low,
        "overhead_high": high,
    }


def _ratio(rounds: Rounds, reference: Rounds, chosen: Sequence[int]) -> float:
    medians = [statistics.median([value for number in chosen for value in one[number]]) for one in (rounds, reference)]
    return medians[0] / medians[1] - 1.0


def _costs(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What the versions cost on each rank, by version."""
    costs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((folder / "stats").glob("rank*.jsonl")):
        for line in read_lines(path):
            costs[line["version"]].append(line)
    return costs


def _traffic(costs: Mapping[int, list[dict[str, Any]]], versions: set[int]) -> dict[str, Any]:
    """Of the versions of counted iterations: how long they took to the slowest holder, and the most in flight."""
    taken = [costs[version] for version in sorted(versions) if version in costs]
    known = [max(times) for lines in taken if (times := _times(lines))]
    peaks = [line["peak_buffer_bytes"] for lines in taken for line in lines]
    return {
        "versions": len(taken),
        "checkpoint_s": _median(known),
        "checkpoint_bytes": max((line["bytes"] for lines in taken for line in lines), default=None),
        "peak_buffer_bytes": max(peaks, default=None),
        "stall_s": _median(line["stall_s"] for lines in taken for line in lines),
    }


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def _times(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    return [line["replica_complete_s"] for line in lines if line["replica_complete_s"] is not None]
