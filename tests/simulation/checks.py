"""What must hold at every instant; whatever does not is kept as a violation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lightning_gemini.callbacks.ranks import RankIdentity
from lightning_gemini.controlplane.kv.base import KeyValue
from lightning_gemini.controlplane.orders import order_from_json
from lightning_gemini.core.placement import Placement
from lightning_gemini.core.recovery import Tier, VersionId
from lightning_gemini.dataplane.slab import Buffer, BufferState
from lightning_gemini.errors import IntegrityError
from tests.simulation.scheduler import Process

_ROOTS_OWN = ("order", "replace", "assign", "result")
_PROGRESS = 5


class Checks:
    """Watches one simulation.

    Args:
        placement: Who holds whose shards.
        nproc_per_machine: Ranks on each machine.
        replicas: Copies of every shard (m).
        note: Takes what goes into the trace.

    Attributes:
        violations: (number of the invariant, what happened); 5 is progress.
        recoveries: Restores by tier, once a generation.
    """

    def __init__(
        self, placement: Placement, nproc_per_machine: int, replicas: int, note: Callable[[str], None]
    ) -> None:
        self._placement, self._nproc, self._replicas, self._note = placement, nproc_per_machine, replicas, note
        self.violations: list[tuple[int, str]] = []
        self.recoveries: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.members: dict[int, str] = {}  # slot -> incarnation, as the store has it
        self.agents: dict[str, Process] = {}  # incarnation -> its process
        self.corrupted: set[tuple[str, int, VersionId]] = set()
        self.failed: set[int] = set()  # slots whose memory was lost since the last full replication
        self.steps: Counter[int] = Counter()
        self._published = 0
        self._committed: set[VersionId] = set()
        self._undisturbed = True  # whether no memory was lost since the last restore
        self._protected = False  # whether a version was ever committed since memory was last of no use
        self._floor: VersionId | None = None
        self._damaged: VersionId | None = None  # newest version of which a replica was damaged, until a newer is full
        self._held: dict[int, str] = {}  # slot -> incarnation, while its lease holds
        self._restored: dict[int, dict[int, Any]] = {}
        self._tiers: dict[int, set[Tier]] = {}
        self._root: str | None = None
        self._order_rank, self._order = (0, False), ""
        self._reported: dict[str, int] = {}
        self._obeyed: dict[tuple[int, int], str] = {}
        self._newest_obeyed: dict[str, int] = {}

    @property
    def root(self) -> Process | None:
        """The elected agent, as far as it lives."""
        process = self.agents.get(self._root) if self._root is not None else None
        return process if process is not None and process.alive else None

    def violated(self, invariant: int, what: str) -> None:
        """Something is wrong."""
        self._note(f"VIOLATION of invariant {invariant}: {what}")
        self.violations.append((invariant, what))

    # -- 1: memory always holds a version ------------------------------------------------------------------------------

    def before_loss(self) -> None:
        """Machines are about to be lost."""
        self._forgive()

    def lost(self, slots: list[int]) -> None:
        """The memory of these slots is gone."""
        self.failed.update(slots)
        self._undisturbed = self._undisturbed and not slots
        complete = self._complete()
        self._floor = max(complete, default=None) if self._damaged is None else None
        if self._protected and len(self.failed) < self._replicas:
            self.done["losses within m"] += 1
            if not complete:
                self.violated(1, f"slots {sorted(self.failed)} lost, m={self._replicas}: no version is left in memory")

    def corrupt(self, slot: int, owner: int, version: VersionId) -> None:
        """A replica was damaged, and nobody knows: its holder counts as lost until a newer version is everywhere."""
        self.corrupted.add((self.members[slot], owner, version))
        self._damaged = max(version, self._damaged or version)
        self.lost([slot])

    def committed(self, version: VersionId | None) -> None:
        """A rank holds ``version`` for committed."""
        if version is None or version in self._committed:
            return
        self._committed.add(version)
        self._protected = True
        self._forgive()
        # Damage after a holder's last look at its replica is nobody's fault, and known to nobody.
        if not self._undisturbed or any(version == damaged for _, _, damaged in self.corrupted):
            return
        self.done["commits"] += 1
        if not self._full(self._complete().get(version, {})):
            self.violated(1, f"{version} is held for committed, but not every holder has it")

    def published(self, rank: int) -> None:
        """A rank has begun to overwrite a buffer: any further machine that may be lost must leave a version."""
        self._published += 1
        if self._published % (len(self._placement.holder_sets) * self._nproc):  # each time after another rank
            return
        if not self._protected or self._replicas - 1 - len(self.failed) < 1:
            return
        self.done["tolerance"] += 1
        needed = [self._indispensable(holders) for holders in self._complete().values()]
        doomed = set.intersection(*needed) if needed else {-1}
        if doomed:
            self.violated(1, f"the loss of machine {min(doomed)} would leave no version in memory")

    def _forgive(self) -> None:
        """Full replication makes earlier losses good."""
        newest = self._damaged
        if self.failed and any(
            self._full(owners) and (newest is None or version > newest) for version, owners in self._complete().items()
        ):
            self.failed.clear()
            self._damaged = None

    def _full(self, owners: dict[int, set[int]]) -> bool:
        return bool(owners) and all(
            set(self._placement.holders(owner // self._nproc)) <= holders for owner, holders in owners.items()
        )

    def _indispensable(self, owners: dict[int, set[int]]) -> set[int]:
        return set().union(*(holders for holders in owners.values() if len(holders) == 1))

    def _complete(self) -> dict[VersionId, dict[int, set[int]]]:
        """The versions of which memory has every shard: version -> owner -> slots that hold it."""
        found: dict[VersionId, dict[int, set[int]]] = {}
        for slot, owner, version, _ in self.replicas_held():
            found.setdefault(version, {}).setdefault(owner, set()).add(slot)
        world_size = len(self._placement.holder_sets) * self._nproc
        return {version: owners for version, owners in found.items() if len(owners) == world_size}

    def replicas_held(self) -> Iterator[tuple[int, int, VersionId, Buffer]]:
        """The complete and undamaged replicas in the memories of the members: slot, owner, version, buffer."""
        for slot, incarnation in self.members.items():
            process = self.agents.get(incarnation)
            duty = None if process is None or not process.alive else process.agent._duty
            if duty is None:
                continue
            for owner, slab in duty.memory._store._slabs.items():
                for buffer in slab.buffers:
                    version = buffer.id
                    if (
                        version is not None
                        and buffer.state is BufferState.COMPLETE
                        and not self._is_damaged(incarnation, owner, version, buffer)
                    ):
                        yield slot, owner, version, buffer

    def _is_damaged(self, incarnation: str, owner: int, version: VersionId, buffer: Buffer) -> bool:
        """Says so until the bytes were replaced by good ones."""
        if (incarnation, owner, version) not in self.corrupted:
            return False
        try:
            buffer.verify()
        except IntegrityError:
            return True
        self.corrupted.discard((incarnation, owner, version))
        return False

    # -- 2: one version, the right bytes -------------------------------------------------------------------------------

    def restored(
        self, identity: RankIdentity, generation: int, tier: Tier, version: VersionId | None, step: int | None = None
    ) -> None:
        """A rank has decided what it goes on from."""
        rank, loaded = identity.global_rank, (version, step)
        ranks = self._restored.setdefault(generation, {})
        ranks[rank] = loaded
        self._note(f"rank {rank} generation {generation} restores {version or step} from {tier}")
        self._tiers.setdefault(generation, set()).add(tier)
        if len(ranks) == len(self._placement.holder_sets) * self._nproc:
            worst = max(self._tiers.pop(generation), key=list(Tier).index)
            self.recoveries[str(worst)] += 1
        if set(ranks.values()) != {loaded}:
            self.violated(2, f"generation {generation} restores different versions: {ranks}")
        if len(ranks) > 1:
            return
        self._undisturbed = True
        if version is None and self._protected and len(self.failed) < self._replicas:
            self.violated(1, f"memory could not serve, but only slots {sorted(self.failed)} were lost")
        if self._floor is not None and (version is None or version < self._floor):
            self.violated(1, f"memory held {self._floor} complete, but {version} was restored")
        if version is None:
            self._protected, self._floor = False, None

    # -- 3: one root, newest orders only -------------------------------------------------------------------------------

    def wrote(self, writer: Process | None, kind: str, slot: str, now: KeyValue | None) -> None:
        """The store accepted a write."""
        if kind == "root":
            self._root = None if now is None else json.loads(now.value)["incarnation"]
        elif kind in _ROOTS_OWN and now is not None and writer is not None:
            self._roots_write(writer, kind, now)
        elif kind == "members":
            self._membership(int(slot), now)
        elif kind == "reports" and now is not None:
            self._report(json.loads(now.value))

    def _roots_write(self, writer: Process, kind: str, now: KeyValue) -> None:
        incarnation = writer.environ.get("INCARNATION")
        if incarnation != self._root:
            self.violated(3, f"{writer} wrote {kind}, but the root is {self._root}")
        if kind == "order":
            order = order_from_json(now.value)
            self._note(f"order: generation {order.generation} {order.phase} by {writer}")
            # The answer to a write may be lost, and the root writes the very same again.
            if order.rank < self._order_rank or (order.rank == self._order_rank and now.value != self._order):
                self.violated(3, f"order {order.rank} was written after {self._order_rank}")
            self._order_rank, self._order = order.rank, now.value

    def _membership(self, slot: int, now: KeyValue | None) -> None:
        if now is None:
            self._held.pop(slot, None)
            return
        incarnation, before = json.loads(now.value)["incarnation"], self.members.get(slot)
        if self._held.setdefault(slot, incarnation) != incarnation:
            self.violated(3, f"{incarnation} took slot {slot} from {self._held[slot]}, whose lease holds")
        if before == incarnation:
            return
        self._note(f"slot {slot}: {incarnation} joins (before: {before})")
        process = self.agents.get(before) if before is not None else None
        if process is not None and process.alive:  # its memory is of no use to anybody any more
            self.before_loss()
            self.members[slot] = incarnation
            self.lost([slot])
        self.members[slot] = incarnation

    def _report(self, report: dict[str, Any]) -> None:
        incarnation, generation = report["incarnation"], report["generation"]
        if generation < self._reported.get(incarnation, 0):
            self.violated(3, f"{incarnation} reports for generation {generation} after a newer one")
        self._reported[incarnation] = generation

    def worker_started(self, worker: Process) -> None:
        """An agent's pool has started a worker."""
        environ, rank = worker.environ, worker.environ["RANK"]
        slot, generation = int(environ["GROUP_RANK"]), int(environ["LIGHTNING_GEMINI_GENERATION"])
        incarnation = environ["INCARNATION"]
        first = self._obeyed.setdefault((generation, slot), incarnation)
        if first != incarnation:
            self.violated(3, f"{first} and {incarnation} both obey in slot {slot} at generation {generation}")
        if generation < self._newest_obeyed.get(incarnation, 0):
            self.violated(3, f"{incarnation} starts a worker of generation {generation} after a newer one")
        self._newest_obeyed[incarnation] = generation
        others = [p for p in worker.machine.processes if p is not worker and p.environ.get("RANK") == rank]
        if others:
            self.violated(3, f"{worker} starts while {others} still run")

    # -- 4 and progress ------------------------------------------------------------------------------------------------

    def stepped(self, rank: int, step: int) -> None:
        """A rank completed a step, with the loss that it should have (its caller has compared)."""
        self.done["losses of a step"] += 1
        self.steps[rank] = max(self.steps[rank], step)

    def stuck(self, what: str) -> None:
        """The job does not end although nothing disturbs it any more."""
        self.violated(_PROGRESS, what)
