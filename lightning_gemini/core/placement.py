"""Which machines hold whose shards (GEMINI, SOSP '23, Algorithm 1, and improvements on it).

A placement is over machines, 0-based. Local rank j of a machine pairs with local rank j of its holders, so one
placement serves any number of processes per machine. Whatever the strategy, every machine hosts as many copies as it
has sent out, its own included.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from lightning_gemini.config import PLACEMENTS
from lightning_gemini.core.compact_sets import compact_sets
from lightning_gemini.core.fields import integer_lists
from lightning_gemini.core.rack_order import rack_groups
from lightning_gemini.errors import PlacementError

__all__ = ["STRATEGIES", "Placement", "placement_from_json", "placement_to_json", "plan_placement"]

STRATEGIES = PLACEMENTS

_Machines = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds whose shards.

    Attributes:
        groups: Machine ranks that exchange replicas among themselves; every machine is in exactly one group.
        holder_sets: ``holder_sets[owner]`` are the machines that hold the owner's shards, the owner itself first.
    """

    groups: tuple[tuple[int, ...], ...]
    holder_sets: tuple[tuple[int, ...], ...]

    def holders(self, owner: int) -> tuple[int, ...]:
        """Returns the machines that hold the shards of machine ``owner``, the owner first."""
        return self.holder_sets[owner]

    def hosted_by(self, machine: int) -> tuple[int, ...]:
        """Returns the machines whose shards ``machine`` holds, itself first, then in ascending order."""
        others = (owner for owner, holders in enumerate(self.holder_sets) if owner != machine and machine in holders)
        return (machine, *others)

    @property
    def distinct_holder_sets(self) -> frozenset[frozenset[int]]:
        """The sets of machines of which one must be lost as a whole before a shard is lost."""
        return frozenset(map(frozenset, self.holder_sets))

    def recoverable(self, failed: AbstractSet[int]) -> bool:
        """Says whether memory still serves every shard: each owner has a holder outside ``failed``.

        A healthy machine in every group is not enough: a ring of three that loses two neighbours loses a shard.
        """
        return all(any(holder not in failed for holder in holders) for holders in self.holder_sets)


def plan_placement(
    machines: int, replicas: int, strategy: str = "mixed", domains: Sequence[str] | None = None
) -> Placement:
    """Plans who holds whose shards. The same arguments give the same placement everywhere.

    Args:
        machines: Machines of the job (N).
        replicas: Copies of every shard, the owner's own included (m).
        strategy: ``mixed`` forms groups of m machines and one ring of the last group and the leftovers; ``group`` is
            the same where m divides N, and refuses where it does not; ``ring`` is one ring of all machines, the
            baseline that GEMINI argues against; ``compact`` is mixed with fewer distinct holder sets among the last
            group and the leftovers; ``rack`` is mixed with groups that span failure domains.
        domains: Failure domain of every machine (its rack, its power supply), by machine rank; only ``rack`` uses it.

    Raises:
        PlacementError: If the numbers are impossible; the message names the remedy.
    """
    labels = None if domains is None else tuple(domains)
    _check(machines, replicas, strategy)
    _check_domains(machines, strategy, labels)
    return _planned(machines, replicas, strategy, labels if strategy == "rack" else None)


def placement_to_json(placement: Placement) -> dict[str, Any]:
    """Returns ``placement`` as plain dicts and lists."""
    return {
        "groups": [list(group) for group in placement.groups],
        "holder_sets": [list(holders) for holders in placement.holder_sets],
    }


def placement_from_json(data: Mapping[str, Any]) -> Placement:
    """Reads what `placement_to_json` wrote.

    Raises:
        ProtocolError: If ``data`` is not a placement.
    """
    return Placement(integer_lists(data, "groups"), integer_lists(data, "holder_sets"))


def _check(machines: int, replicas: int, strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise PlacementError(f"placement must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if machines < 1:
        raise PlacementError(f"a placement needs at least 1 machine, got {machines}: start the job with 1 or more")
    if replicas < 1:
        raise PlacementError(
            f"replicas must be 1 or more (the owner's own copy counts), got {replicas}: "
            "use replicas=1 to survive the death of a process, 2 or more to survive the loss of a machine"
        )
    if replicas > machines:
        raise PlacementError(
            f"replicas={replicas} needs {replicas} machines, the job has {machines}: "
            f"set replicas to {machines} or less, or add {replicas - machines} machine(s)"
        )
    if strategy == "group" and machines % replicas:
        raise PlacementError(
            f"placement='group' needs a number of machines that replicas divides, got {machines} machines and "
            f"replicas={replicas}: use placement='mixed', or {machines - machines % replicas} or "
            f"{machines - machines % replicas + replicas} machines"
        )


def _check_domains(machines: int, strategy: str, domains: tuple[str, ...] | None) -> None:
    if domains is None:
        if strategy == "rack":
            raise PlacementError(
                "placement='rack' needs the failure domain of every machine and got none: "
                "give domains, one label a machine, or use placement='mixed'"
            )
        return
    if len(domains) != machines:
        raise PlacementError(
            f"domains must name one failure domain a machine, got {len(domains)} for {machines} machines: "
            "repeat the label of a domain for each of its machines"
        )
    unknown = [machine for machine, domain in enumerate(domains) if not domain]
    if unknown and strategy == "rack":
        raise PlacementError(
            f"placement='rack' needs the failure domain of every machine, those of machines "
            f"{', '.join(map(str, unknown[:8]))} are unknown: set LIGHTNING_GEMINI_DOMAIN there, or give domains"
        )


@functools.lru_cache(maxsize=64)
def _planned(machines: int, replicas: int, strategy: str, domains: tuple[str, ...] | None) -> Placement:
    if strategy == "ring":
        return _placement((tuple(range(machines)),), replicas)
    if domains is not None:
        return _placement(rack_groups(domains, replicas), replicas)
    groups = _groups(machines, replicas)
    if strategy != "compact":
        return _placement(groups, replicas)
    holders = compact_sets(tuple(range(machines)), replicas)
    return Placement(groups, tuple(_from_owner(owner, holders[owner], machines) for owner in range(machines)))


def _placement(groups: tuple[_Machines, ...], replicas: int) -> Placement:
    return Placement(groups, _holder_sets(groups, replicas))


def _from_owner(owner: int, holders: _Machines, machines: int) -> _Machines:
    """Orders the holders as in a ring of all machines, the owner first, so that not all turn to the same one first."""
    return tuple(sorted(holders, key=lambda holder: (holder - owner) % machines))


def _groups(machines: int, replicas: int) -> tuple[tuple[int, ...], ...]:
    """Cuts the machines into groups of ``replicas``; the leftovers join the last group."""
    starts = range(0, machines - machines % replicas, replicas)
    ends = [*starts[1:], machines]
    return tuple(tuple(range(start, end)) for start, end in zip(starts, ends, strict=True))


def _holder_sets(groups: tuple[tuple[int, ...], ...], replicas: int) -> tuple[tuple[int, ...], ...]:
    """Lets each machine send to the next ``replicas - 1`` of its group, which is a ring, or all of a group of m."""
    holders: dict[int, tuple[int, ...]] = {}
    for group in groups:
        for position, owner in enumerate(group):
            holders[owner] = tuple(group[(position + hop) % len(group)] for hop in range(replicas))
    return tuple(holders[owner] for owner in sorted(holders))
