"""Which version to load after a failure, and which machine sends what to whom.

The same pure function decides in the root, ahead of time, and again in every worker from what the agents really hold.
All callers with the same inventories compute the same plan, whatever the order in which these arrived.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_gemini.core.fields import boolean, integer, integers, items, mapping, mappings
from lightning_gemini.core.placement import Placement
from lightning_gemini.errors import LayoutMismatchError, ProtocolError

__all__ = [
    "Fetch",
    "Holding",
    "Inventory",
    "RecoveryPlan",
    "Tier",
    "VersionId",
    "fetch_from_json",
    "fetch_to_json",
    "inventory_from_json",
    "inventory_to_json",
    "plan_from_json",
    "plan_recovery",
    "plan_to_json",
    "version_from_json",
    "version_to_json",
]


class Tier(str, enum.Enum):
    """Where a rank's state comes from."""

    LOCAL_MEMORY = "local_memory"
    REMOTE_MEMORY = "remote_memory"
    PERSISTENT = "persistent"
    NONE = "none"

    __str__ = str.__str__  # what enum.StrEnum of Python 3.11 does


@dataclass(frozen=True, slots=True, order=True)
class VersionId:
    """One version of the job's state, ordered by generation first.

    Attributes:
        generation: The generation that wrote it.
        version: The optimizer step whose outcome it is.
    """

    generation: int
    version: int


@dataclass(frozen=True, slots=True)
class Holding:
    """A complete replica of one shard.

    Attributes:
        owner: Global rank that the shard belongs to.
        id: Its version.
        retrieved: Whether it came from a peer during this recovery.
    """

    owner: int
    id: VersionId
    retrieved: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """The complete replicas in the memory of one machine."""

    machine: int
    holdings: tuple[Holding, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """One shard on its way between two machines.

    Attributes:
        owner: Global rank that the shard belongs to.
        source: Machine that holds it.
        target: Machine that needs it.
        id: Its version.
    """

    owner: int
    source: int
    target: int
    id: VersionId


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """What every rank loads, and what has to travel for it.

    Attributes:
        id: The version that all ranks load; ``None`` where memory cannot serve: use the persistent tier or start fresh.
        tiers: Where each global rank's state comes from; all `Tier.NONE` where memory cannot serve.
        fetches: What owners need before they can restore.
        refills: What other holders lack for full replication; may travel in the background.
        missing: Global ranks whose shard of the newest version seen is nowhere. Empty where that version is loaded,
            and where no machine holds anything.
    """

    id: VersionId | None
    tiers: tuple[Tier, ...]
    fetches: tuple[Fetch, ...] = ()
    refills: tuple[Fetch, ...] = ()
    missing: tuple[int, ...] = ()


def plan_recovery(placement: Placement, nproc_per_machine: int, inventories: Sequence[Inventory]) -> RecoveryPlan:
    """Plans the recovery from memory.

    The newest version wins of which every rank's shard is complete on some machine that reported. A machine that did
    not report counts as empty. Several inventories of one machine count as their union.

    Args:
        placement: Who holds whose shards.
        nproc_per_machine: Ranks on each machine.
        inventories: What the machines hold, in any order.

    Raises:
        LayoutMismatchError: If a machine or shard is outside this job's world: memory of another world size.
    """
    stock = _Stock.of(placement, nproc_per_machine, inventories)
    seen = stock.versions()
    loaded = next((version for version in seen if not stock.missing(version)), None)
    missing = stock.missing(seen[0]) if seen else ()
    if loaded is None:
        return RecoveryPlan(None, (Tier.NONE,) * stock.world_size, missing=missing)
    owners = range(stock.world_size)
    needs = [(owner, stock.machine_of(owner)) for owner in owners]
    spares = [(owner, holder) for owner in owners for holder in placement.holders(stock.machine_of(owner))[1:]]
    load: Counter[int] = Counter()
    return RecoveryPlan(
        id=loaded,
        tiers=tuple(stock.tier(owner, loaded) for owner in owners),
        fetches=stock.fetches(needs, loaded, load),
        refills=stock.fetches(spares, loaded, load),
        missing=missing,
    )


@dataclass(slots=True)
class _Stock:
    """Where every replica is: version → owner → machine → whether it was retrieved."""

    placement: Placement
    nproc_per_machine: int
    replicas: dict[VersionId, dict[int, dict[int, bool]]] = field(default_factory=dict)

    @classmethod
    def of(cls, placement: Placement, nproc_per_machine: int, inventories: Sequence[Inventory]) -> _Stock:
        stock = cls(placement, nproc_per_machine)
        for inventory in inventories:
            stock._check_machine(inventory.machine)
            for holding in inventory.holdings:
                stock._add(inventory.machine, holding)
        return stock

    @property
    def world_size(self) -> int:
        return len(self.placement.holder_sets) * self.nproc_per_machine

    def machine_of(self, owner: int) -> int:
        return owner // self.nproc_per_machine

    def versions(self) -> list[VersionId]:
        """Returns every version seen, newest first."""
        return sorted(self.replicas, reverse=True)

    def missing(self, version: VersionId) -> tuple[int, ...]:
        return tuple(owner for owner in range(self.world_size) if owner not in self.replicas[version])

    def tier(self, owner: int, version: VersionId) -> Tier:
        retrieved = self.replicas[version][owner].get(self.machine_of(owner), True)
        return Tier.REMOTE_MEMORY if retrieved else Tier.LOCAL_MEMORY

    def fetches(self, wanted: Iterable[tuple[int, int]], version: VersionId, load: Counter[int]) -> tuple[Fetch, ...]:
        """Finds a source for each wanted (owner, target machine) that lacks its replica; ``load`` counts per source."""
        plan: list[Fetch] = []
        for owner, target in wanted:
            if target in self.replicas[version][owner]:
                continue
            source = self._source(owner, version, load)
            load[source] += 1
            plan.append(Fetch(owner, source, target, version))
        return tuple(plan)

    def _source(self, owner: int, version: VersionId, load: Counter[int]) -> int:
        """Picks the least busy machine that holds the replica, so that several holders share the sending."""
        holders = self.placement.holders(self.machine_of(owner))
        return min(self.replicas[version][owner], key=lambda machine: (load[machine], machine not in holders, machine))

    def _add(self, machine: int, holding: Holding) -> None:
        if not 0 <= holding.owner < self.world_size:
            raise LayoutMismatchError(
                f"machine {machine} holds the shard of rank {holding.owner}, but this job has {self.world_size} ranks "
                f"({len(self.placement.holder_sets)} machines × {self.nproc_per_machine}): start it with the machines "
                "and processes that wrote the memory, or end the agents to give that memory up"
            )
        machines = self.replicas.setdefault(holding.id, {}).setdefault(holding.owner, {})
        machines[machine] = machines.get(machine, False) or holding.retrieved

    def _check_machine(self, machine: int) -> None:
        if not 0 <= machine < len(self.placement.holder_sets):
            raise LayoutMismatchError(
                f"machine {machine} reported its memory, but this job has {len(self.placement.holder_sets)} machines: "
                "start it with as many machines as wrote the memory, or end that agent"
            )


def version_to_json(version: VersionId) -> dict[str, int]:
    """Returns ``version`` as a plain dict."""
    return {"generation": version.generation, "version": version.version}


def version_from_json(data: Mapping[str, Any]) -> VersionId:
    """Reads what `version_to_json` wrote; raises `ProtocolError` on anything else."""
    return VersionId(integer(data, "generation"), integer(data, "version"))


def fetch_to_json(fetch: Fetch) -> dict[str, Any]:
    """Returns ``fetch`` as a plain dict."""
    route = {"owner": fetch.owner, "source": fetch.source, "target": fetch.target}
    return {**route, "id": version_to_json(fetch.id)}


def fetch_from_json(data: Mapping[str, Any]) -> Fetch:
    """Reads what `fetch_to_json` wrote; raises `ProtocolError` on anything else."""
    version = version_from_json(mapping(data, "id"))
    return Fetch(integer(data, "owner"), integer(data, "source"), integer(data, "target"), version)


def inventory_to_json(inventory: Inventory) -> dict[str, Any]:
    """Returns ``inventory`` as plain dicts and lists."""
    holdings = [
        {"owner": holding.owner, "id": version_to_json(holding.id), "retrieved": holding.retrieved}
        for holding in inventory.holdings
    ]
    return {"machine": inventory.machine, "holdings": holdings}


def inventory_from_json(data: Mapping[str, Any]) -> Inventory:
    """Reads what `inventory_to_json` wrote; raises `ProtocolError` on anything else."""
    holdings = tuple(
        Holding(integer(item, "owner"), version_from_json(mapping(item, "id")), boolean(item, "retrieved"))
        for item in mappings(data, "holdings")
    )
    return Inventory(integer(data, "machine"), holdings)


def plan_to_json(plan: RecoveryPlan) -> dict[str, Any]:
    """Returns ``plan`` as plain dicts and lists."""
    return {
        "id": None if plan.id is None else version_to_json(plan.id),
        "tiers": [tier.value for tier in plan.tiers],
        "fetches": [fetch_to_json(fetch) for fetch in plan.fetches],
        "refills": [fetch_to_json(fetch) for fetch in plan.refills],
        "missing": list(plan.missing),
    }


def plan_from_json(data: Mapping[str, Any]) -> RecoveryPlan:
    """Reads what `plan_to_json` wrote; raises `ProtocolError` on anything else."""
    tiers = tuple(_tier(value) for value in items(data, "tiers"))
    return RecoveryPlan(
        id=None if data.get("id") is None else version_from_json(mapping(data, "id")),
        tiers=tiers,
        fetches=tuple(fetch_from_json(item) for item in mappings(data, "fetches")),
        refills=tuple(fetch_from_json(item) for item in mappings(data, "refills")),
        missing=integers(data, "missing"),
    )


def _tier(value: Any) -> Tier:
    try:
        return Tier(value)
    except ValueError:
        raise ProtocolError(
            f"expected a tier of {', '.join(Tier)}, found {value!r:.80}: are all machines of one version?"
        ) from None
