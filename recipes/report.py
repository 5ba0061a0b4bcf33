"""What a run's files say: iteration times, what checkpoints cost, what every failure cost, and whether losses agree.

Reads ``events.jsonl``, ``steps/rank{R}.jsonl`` (written by recipes/gpt2.py) and ``stats/rank{R}.jsonl`` (written by the
checkpoint callback) of a run directory. Times are unix seconds, durations seconds.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

TIERS = ("local_memory", "remote_memory", "persistent")
_WARM_UP_STEPS = 3
_CLOCK_SLACK_S = 1.0
"""A failure may be seen before its injector has written down that it killed."""


class IncompleteRunError(Exception):
    """A run's files do not say what the report needs."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a run wrote.

    Attributes:
        folder: The run directory.
        events: The event log, ordered by time.
        steps: Global rank to its completed optimizer steps, in the order of training; trained again means listed again.
        stats: Global rank to its checkpoint statistics, one record a version.
    """

    folder: Path
    events: tuple[Record, ...]
    steps: Mapping[int, tuple[Record, ...]]
    stats: Mapping[int, tuple[Record, ...]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One injected failure, with what the job did about it.

    Attributes:
        kind: ``software``, ``hardware``, or ``group``: several machines at the same moment.
        nodes: Machine ranks that were hit.
        time: When SIGKILL was sent.
        detected: When the job noticed.
        restore_began: When the last rank began to restore; ``restore_ended``: when it had restored.
        resumed: When the last rank completed its first step afterwards.
        version: The optimizer step that was restored.
        record: The failure's entry in ``report.json``.
    """

    kind: str
    nodes: tuple[int, ...]
    time: float
    detected: float
    restore_began: float
    restore_ended: float
    resumed: float
    version: int
    record: Record


def read_run(folder: Path) -> Run:
    """Reads a run directory.

    Raises:
        IncompleteRunError: A file is missing or holds something else than JSON lines.
    """
    return Run(
        folder=folder,
        events=tuple(sorted(_read_lines(folder / "events.jsonl"), key=lambda event: event["time"])),
        steps=_by_rank(folder / "steps"),
        stats=_by_rank(folder / "stats"),
    )


def faults(run: Run) -> list[Fault]:
    """Every injected failure of a run, in the order of time.

    Raises:
        IncompleteRunError: A failure was not noticed, or not everyone restored and went on.
    """
    injected = _injections(run.events)
    ends = [following[0]["time"] for following in injected[1:]] + [math.inf]
    return [_fault(run, group, end) for group, end in zip(injected, ends, strict=True)]


def losses(run: Run) -> dict[int, tuple[float, ...]]:
    """Global rank to its loss at steps 1, 2, …; the last value counts where a step was trained again.

    Raises:
        IncompleteRunError: A step is missing.
    """
    return {rank: _loss_curve(run.folder, rank, records) for rank, records in run.steps.items()}


def differences(run: Run, reference: Run) -> list[str]:
    """Where a loss that ``run`` ever computed, steps trained again included, differs in any bit from ``reference``."""
    expected = losses(reference)
    if set(run.steps) != set(expected):
        return [f"{run.folder} has ranks {sorted(run.steps)}, {reference.folder} has {sorted(expected)}"]
    curves = losses(run)
    lengths = [
        f"rank {r} has {len(curves[r])} steps, not {len(expected[r])}"
        for r in expected
        if len(curves[r]) != len(expected[r])
    ]
    return lengths or [
        f"rank {rank} step {r['step']}: {r['loss'].hex()}, not {expected[rank][r['step'] - 1].hex()}"
        for rank, records in run.steps.items()
        for r in records
        if r["loss"] != expected[rank][r["step"] - 1]
    ]


def mean_losses(run: Run) -> list[float]:
    """Loss at steps 1, 2, …, averaged over ranks."""
    return [math.fsum(values) / len(values) for values in zip(*losses(run).values(), strict=True)]


def iteration_s(run: Run) -> float:
    """Median seconds between two steps of a rank, without the first few."""
    pairs = [pair for rank in run.steps.values() for pair in _neighbours(rank[_WARM_UP_STEPS:])]
    gaps: list[float] = [after["time"] - before["time"] for before, after in pairs]
    if not gaps:
        raise IncompleteRunError(f"{run.folder}: too few steps to tell the time of one")
    return statistics.median(gaps)


def checkpoint_cost(run: Run, without: Run) -> Record:
    """The report's ``checkpoint`` section: what versions cost in an undisturbed run, against one without any."""
    stored = [version for rank in run.stats.values() for version in rank]
    if not stored:
        raise IncompleteRunError(f"{run.folder}: no rank stored any version")
    return {
        "bytes_per_rank": int(statistics.median(version["bytes"] for version in stored)),
        "stall_s_median": statistics.median(version["stall_s"] for version in stored),
        "replica_complete_s_median": _median_or_none(version["replica_complete_s"] for version in stored),
        "versions": len(stored),
        "versions_skipped": sum(max(version["skipped"] for version in rank) for rank in run.stats.values() if rank),
        "iteration_s_median": iteration_s(run),
        "iteration_s_median_without": iteration_s(without),
    }


def _fault(run: Run, injected: Sequence[Record], end: float) -> Fault:
    """Follows one failure from its injection to the first step that everybody completed afterwards."""
    time = injected[0]["time"]
    window = [event for event in run.events if time - _CLOCK_SLACK_S <= event["time"] < end]
    where = f"{run.folder}: the failure at {time:.3f}"
    detected = _first(window, "failure_detected", f"{where} was never noticed")
    restored = _restored(window, set(run.steps), where)
    versions = sorted({event["version"] for event in restored.values()})
    if len(versions) != 1:
        raise IncompleteRunError(f"{where}: ranks restored different versions, {versions}")
    resumed = max(_next_step(run.steps[rank], event["time"], where) for rank, event in restored.items())
    restore_began = max(event["time"] - event["seconds"] for event in restored.values())
    nodes = tuple(sorted({node for event in injected for node in _nodes(event)}))
    kind = "group" if len(nodes) > 1 else str(injected[0]["kind"])
    at_step = min(int(event["at_step"]) for event in injected)
    fetches = [event["seconds"] for event in window if event["event"] == "retrieved"]
    record = {
        "kind": kind,
        "nodes": list(nodes),
        "at_step": at_step,
        "signal": injected[0]["signal"],
        "killed_pids": [pid for event in injected for pid in event["pids"]],
        "resumed_from_version": versions[0],
        # A rank may complete another step while the order to kill is on its way, so the version can be the newer one.
        "lost_steps": max(0, at_step - versions[0]),
        "tiers": {tier: sum(event["tier"] == tier for event in restored.values()) for tier in TIERS},
        "tier_of_rank": [restored[rank]["tier"] for rank in sorted(restored)],
        "detect_s": max(0.0, detected["time"] - time),
        "retrieve_s": max(fetches, default=0.0),
        "restart_s": restore_began - detected["time"],
        "restore_s": max(event["seconds"] for event in restored.values()),
        "total_s": resumed - time,
    }
    ended = max(event["time"] for event in restored.values())
    return Fault(kind, nodes, time, detected["time"], restore_began, ended, resumed, versions[0], record)


def _injections(events: Sequence[Record]) -> list[list[Record]]:
    """Injected failures; what was killed before the job had answered the failure before belongs to that one."""
    groups: list[list[Record]] = []
    answered = True
    for event in events:
        if event["event"] == "generation_started":
            answered = True
        elif event["event"] == "fault_injected":
            if answered:
                groups.append([])
            groups[-1].append(event)
            answered = False
    return groups


def _nodes(injected: Record) -> list[int]:
    nodes = injected.get("nodes")
    return [int(node) for node in nodes] if nodes else [int(injected["node"])]


def _first(window: Sequence[Record], name: str, otherwise: str) -> Record:
    for event in window:
        if event["event"] == name:
            return event
    raise IncompleteRunError(otherwise)


def _restored(window: Sequence[Record], ranks: set[int], where: str) -> dict[int, Record]:
    """Every rank's restore in the last generation of the window: an earlier one may itself have been cut short."""
    events = [event for event in window if event["event"] == "restored"]
    last = max((event["generation"] for event in events), default=None)
    restored = {event["rank"]: event for event in events if event["generation"] == last}
    if missing := sorted(ranks - set(restored)):
        raise IncompleteRunError(f"{where}: ranks {missing} did not say that they restored")
    return restored


def _next_step(records: Sequence[Record], after: float, where: str) -> float:
    for record in records:
        if record["time"] > after:
            return float(record["time"])
    raise IncompleteRunError(f"{where}: a rank completed no step afterwards")


def _loss_curve(folder: Path, rank: int, records: Sequence[Record]) -> tuple[float, ...]:
    newest = {int(record["step"]): float(record["loss"]) for record in records}
    if missing := [step for step in range(1, max(newest, default=0) + 1) if step not in newest]:
        raise IncompleteRunError(f"{folder}: rank {rank} lacks steps {missing[:5]}")
    return tuple(newest[step] for step in sorted(newest))


def _neighbours(records: Sequence[Record]) -> Iterable[tuple[Record, Record]]:
    """Pairs of records of which the second is the very next step."""
    return ((a, b) for a, b in itertools.pairwise(records) if b["step"] == a["step"] + 1)


def _median_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _by_rank(folder: Path) -> dict[int, tuple[Record, ...]]:
    files = {int(path.stem.removeprefix("rank")): path for path in folder.glob("rank*.jsonl")}
    return {rank: tuple(_read_lines(files[rank])) for rank in sorted(files)}


def _read_lines(path: Path) -> list[Record]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise IncompleteRunError(f"cannot read {path}: {error}") from error
