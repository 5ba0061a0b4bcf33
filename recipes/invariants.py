"""What must be true of every run, whatever was done to it: checked from its events, steps and committed versions.

Reads what ``report.read_run`` does; the steps must name their generation, as those of ``recipes/soak_training.py`` do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from report import Run

_SLACK_S = 2.0
"""A version is known to be committed a little before that is written down; what was lost in between counts as lost."""
_FATAL = ("hardware", "root", "correlated", "group")
_MEMORY = ("local_memory", "remote_memory")


@dataclass(frozen=True, slots=True)
class Recovery:
    """All ranks restored in one generation.

    Attributes:
        generation: Which.
        version: What they restored; None where they disagree.
        tiers: Global rank → where its state came from.
        began: Unix seconds when the first rank began to restore.
        ended: When the last rank had restored.
    """

    generation: int
    version: int | None
    tiers: Mapping[int, str]
    began: float
    ended: float

    @property
    def tier(self) -> str:
        """The farthest tier that any rank needed."""
        return max(self.tiers.values(), key=["local_memory", "remote_memory", "persistent"].index)


def recoveries(run: Run) -> list[Recovery]:
    """Every generation in which ranks restored, in order; an unfinished one has fewer ranks."""
    events = [event for event in run.events if event["event"] == "restored"]
    found = []
    for generation in sorted({event["generation"] for event in events}):
        mine = [event for event in events if event["generation"] == generation]
        versions = {event["version"] for event in mine}
        found.append(
            Recovery(
                generation,
                versions.pop() if len(versions) == 1 else None,
                {event["rank"]: event["tier"] for event in mine},
                min(event["time"] - event["seconds"] for event in mine),
                max(event["time"] for event in mine),
            )
        )
    return found


def violations(run: Run, holders: Sequence[Sequence[int]]) -> list[str]:
    """Everything that breaks an invariant, in words.

    Args:
        run: The run.
        holders: Machines that hold each machine's shards, one list a machine; one rank runs on each.
    """
    return [*_generations(run), *_agreement(run), *_continuity(run), *_freshness(run, holders)]


def _generations(run: Run) -> Iterator[str]:
    """Generations strictly increase, and each has one root, which announces it once."""
    started = [event["generation"] for event in run.events if event["event"] == "generation_started"]
    for before, after in itertools.pairwise(started):
        if after <= before:
            yield f"generation {after} started after generation {before}"


def _agreement(run: Run) -> Iterator[str]:
    """All ranks load exactly one version in a recovery, and each loads it once."""
    for event in recoveries(run):
        if event.version is None:
            yield f"generation {event.generation}: ranks restored different versions"
    seen = [(event["generation"], event["rank"]) for event in run.events if event["event"] == "restored"]
    for generation, rank in sorted({pair for pair in seen if seen.count(pair) > 1}):
        yield f"generation {generation}: rank {rank} restored more than once"


def _continuity(run: Run) -> Iterator[str]:
    """In a generation every rank trains the steps right after the restored version, none twice and none left out."""
    restored = {event.generation: event.version for event in recoveries(run)}
    for rank, records in run.steps.items():
        for generation, group in itertools.groupby(records, key=lambda record: record["generation"]):
            steps = [record["step"] for record in group]
            first = (restored.get(generation) or 0) + 1
            if steps != list(range(first, first + len(steps))):
                yield f"generation {generation}, rank {rank}: expected steps from {first} on, found {_short(steps)}"


def _freshness(run: Run, holders: Sequence[Sequence[int]]) -> Iterator[str]:
    """Memory serves unless every holder of a shard was lost or corrupted, and never anything older than committed."""
    by_generation = {event.generation: event for event in recoveries(run)}
    for generation in _trained(run):
        newest = newest_committed(run, generation)
        if newest is None:
            continue
        (_, version), since = newest
        event = by_generation.get(generation)
        if event is None:
            if _persisted(run, generation) or not _unservable(run, holders, newest[0], since, _began(run, generation)):
                yield f"generation {generation} started from scratch although version {version} was committed"
        elif not _unservable(run, holders, newest[0], since, event.ended):
            if event.tier not in _MEMORY:
                yield (
                    f"generation {generation} restored from {event.tier} although every shard of version {version} "
                    f"had a holder since {since:.3f}"
                )
            elif event.version is not None and event.version < version:
                yield f"generation {generation} restored version {event.version}, older than committed {version}"


def newest_committed(run: Run, before_generation: int) -> tuple[tuple[int, int], float] | None:
    """The newest version, as (generation, step), that earlier generations committed, and when that was first known.

    A rank writes a version down once it is complete on all its holders, which all ranks learn together.
    """
    committed: dict[tuple[int, int], float] = {}
    for records in run.stats.values():
        for record in records:
            key = (record["generation"], record["version"])
            if key[0] < before_generation:
                committed[key] = min(record["time"], committed.get(key, record["time"]))
    return (max(committed), committed[max(committed)]) if committed else None


def _persisted(run: Run, before_generation: int) -> bool:
    """Whether an earlier generation left a checkpoint in the persistent tier."""
    return any(event["event"] == "persisted" and event["generation"] < before_generation for event in run.events)


def _began(run: Run, generation: int) -> float:
    """When its first step was over."""
    return min(
        record["time"] for records in run.steps.values() for record in records if record["generation"] == generation
    )


def _trained(run: Run) -> list[int]:
    """Generations in which at least one rank completed a step, or restored, after the first."""
    trained = {record["generation"] for records in run.steps.values() for record in records}
    return sorted(trained | {event.generation for event in recoveries(run)})


def _unservable(
    run: Run, holders: Sequence[Sequence[int]], version: tuple[int, int], since: float, until: float
) -> list[int]:
    """Machines whose shards of a version no machine held any more, for all that was done to the job meanwhile."""
    window = [event for event in run.events if since - _SLACK_S <= event["time"] <= until]
    lost, corrupted = set[int](), set[tuple[int, int]]()
    for event in window:
        if event["event"] == "fault_injected" and event["kind"] in _FATAL:
            lost |= set(event["nodes"])
        elif event["event"] == "failure_detected":
            lost |= set(event["nodes_lost"])
    for event in run.events:
        flipped = event["event"] == "fault_injected" and event["kind"] == "corrupt" and event["time"] <= until
        if flipped and (event["version_generation"], event["version"]) >= version:
            corrupted.add((event["owner"], event["node"]))
    return [
        owner
        for owner, machines in enumerate(holders)
        if all(machine in lost or (owner, machine) in corrupted for machine in machines)
    ]


def _short(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:6])) + (" …" if len(steps) > 6 else "")
