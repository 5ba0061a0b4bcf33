"""The shards in one machine's memory: those of its own ranks, and its peers' replicas."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterator

from lightning_gemini.core.consistency import replica_place, retrieval_place, superseded
from lightning_gemini.core.placement import Placement, plan_placement
from lightning_gemini.core.recovery import Holding, Inventory, VersionId
from lightning_gemini.dataplane.capacity import require_memory
from lightning_gemini.dataplane.slab import Buffer, BufferState, Slab
from lightning_gemini.errors import IntegrityError, LayoutMismatchError, ProtocolError

log = logging.getLogger(__name__)


class ShardStore:
    """Slabs by owner. Thread-safe; the bytes themselves are written by one owner thread at a time.

    Args:
        machine: This machine's rank.
    """

    def __init__(self, machine: int) -> None:
        self.machine = machine
        self._lock = threading.RLock()
        self._making = threading.Lock()  # taken before the other one
        self._job = 0  # another number when all slabs are freed, or others will be needed
        self._slabs: dict[int, Slab] = {}
        self._writers: dict[int, threading.Lock] = collections.defaultdict(threading.Lock)
        self.generation = 0
        self._left_behind = False  # whether ranks went on from `_resumed` in this generation
        self._resumed: VersionId | None = None
        self.machines = 1
        self.nproc_per_machine: int | None = None
        self.replicas: int | None = None
        self.strategy: str | None = None
        self.domains: tuple[str, ...] | None = None

    # -- the job's shape -------------------------------------------------------------------------------------------

    def enter_generation(self, generation: int, machines: int, nproc_per_machine: int) -> None:
        """Refuse replicas of older generations from now on.

        Raises:
            LayoutMismatchError: Memory holds a job of another shape; nothing is changed.
        """
        with self._lock:
            if self._slabs and (self.machines, self.nproc_per_machine) != (machines, nproc_per_machine):
                raise LayoutMismatchError(
                    f"memory holds a job of {self.machines} machines x {self.nproc_per_machine} ranks, this run has "
                    f"{machines} x {nproc_per_machine}: start it with the same shape, or run "
                    "'lightning-gemini stop --agents' to discard what memory holds"
                )
            self._job += (self.machines, self.nproc_per_machine) != (machines, nproc_per_machine)
            self._left_behind = self._left_behind and generation <= self.generation
            self.generation = max(self.generation, generation)
            self.machines, self.nproc_per_machine = machines, nproc_per_machine

    def set_replication(self, replicas: int, strategy: str, domains: tuple[str, ...] | None = None) -> None:
        """How many copies, and where: what the user's strategy asks for."""
        plan_placement(self.machines, replicas, strategy, domains)  # a clear error before anything changes
        with self._lock:
            self.replicas, self.strategy, self.domains = replicas, strategy, domains

    @property
    def placement(self) -> Placement | None:
        """Which machines hold whose shards; ``None`` until a worker said how many replicas it wants."""
        if self.replicas is None or self.strategy is None:
            return None
        return plan_placement(self.machines, self.replicas, self.strategy, self.domains)

    # -- slabs -----------------------------------------------------------------------------------------------------

    def own(self, owner: int, shard_bytes: int) -> Slab:
        """The slab of a rank of this machine; made on first use, kept over restarts of the rank.

        Raises:
            CapacityError: The machine has not enough memory for it and for the replicas that will come.
        """
        replicas, ranks = self.replicas or 1, self.nproc_per_machine or 1
        return self._slab_for(
            owner, shard_bytes, lambda: require_memory(shard_bytes, replicas, ranks, already_bytes=self.total_bytes)
        )

    def _slab_for(self, owner: int, data_bytes: int, require: Callable[[], None] = lambda: None) -> Slab:
        """The owner's slab; ``require`` raises where none may be made for it."""
        return self.slab(owner) or self._make(owner, data_bytes, require)

    def _make(self, owner: int, data_bytes: int, require: Callable[[], None]) -> Slab:
        """The slab of an owner that had none; a large one takes seconds, in which nobody waits who needs no new one.

        Raises:
            ProtocolError: Meanwhile memory was freed, or became that of a job of another shape.
        """
        with self._making:
            with self._lock:
                job, known = self._job, self._slabs.get(owner)
            if known is not None:
                return known
            require()
            slab = Slab.create(owner, data_bytes)
            with self._lock:
                if self._job == job:
                    self._slabs[owner] = slab
                    return slab
        slab.close()
        raise ProtocolError(f"wants no memory for rank {owner} any more")

    def slab(self, owner: int) -> Slab | None:
        """The slab of this owner, if there is one."""
        with self._lock:
            return self._slabs.get(owner)

    def slabs(self) -> list[Slab]:
        """All slabs, by owner."""
        with self._lock:
            return [self._slabs[owner] for owner in sorted(self._slabs)]

    def own_ranks(self) -> range:
        """Global ranks of this machine."""
        per_machine = self.nproc_per_machine or 0
        return range(self.machine * per_machine, (self.machine + 1) * per_machine)

    @property
    def total_bytes(self) -> int:
        """Shared memory taken."""
        return sum(slab.total_bytes for slab in self.slabs())

    @property
    def committed(self) -> VersionId | None:
        """The newest version that a rank of this machine knows to be complete on all holders of all ranks."""
        slabs = [slab for rank in self.own_ranks() if (slab := self._slabs.get(rank)) is not None]
        return max((known for slab in slabs if (known := slab.committed) is not None), default=None)

    def inventory(self) -> Inventory:
        """Every complete version here."""
        return Inventory(self.machine, tuple(self._holdings()))

    def _holdings(self) -> Iterator[Holding]:
        for slab in self.slabs():
            for buffer in slab.buffers:
                view = buffer.view  # once: its owner may begin the next version meanwhile
                if view.complete and view.id is not None:
                    yield Holding(slab.owner, view.id, buffer.retrieved)

    # -- what happens to versions ------------------------------------------------------------------------------------

    def writer(self, owner: int) -> threading.Lock:
        """See :class:`~lightning_gemini.dataplane.transport.reception.ShardHost`."""
        with self._lock:
            return self._writers[owner]

    def wait_for_writers(self, timeout_s: float) -> bool:
        """Wait until nothing that peers sent is being written any more; false if that takes too long."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            writers = list(self._writers.values())
        for writer in writers:
            if not writer.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return False
            writer.release()
        return True

    def replica_target(
        self,
        owner: int,
        version: VersionId,
        data_bytes: int,
        sender_generation: int,
        kept: VersionId | None = None,
    ) -> Buffer | None:
        """See :class:`~lightning_gemini.dataplane.transport.reception.ShardHost`. The buffer is begun."""

        def require() -> None:
            with self._lock:
                self._require_hosted(owner, sender_generation)
                self._require_wanted(owner, version)

        slab = self._slab_for(owner, data_bytes, require)
        with self._lock:
            require()
            if slab.holding(version) is not None:
                return None
            known = [kept, self.committed]  # the owner may be a new machine, which knows nothing
            kept = max((one for one in known if one is not None and one < version), default=None)
            place = replica_place(slab.views, version, kept)
            for index in place.given_up:
                slab.buffers[index].drop()
            if place.index is None:
                raise ProtocolError(f"holds newer versions of rank {owner} than {version.version}")
            buffer = slab.buffers[place.index]
            buffer.begin(version, data_bytes)
            return buffer

    def recheck(self, owner: int, version: VersionId) -> bool:
        """See :class:`~lightning_gemini.dataplane.transport.reception.ShardHost`."""
        buffer = self.complete_buffer(owner, version)
        try:
            if buffer is not None:
                buffer.verify()
            return buffer is not None
        except IntegrityError as error:
            if self.complete_buffer(owner, version) is None:  # its owner began the next version meanwhile
                return False
            log.warning("machine %d drops its copy of version %d: %s", self.machine, version.version, error)
            self.discard(owner, version)
            return False

    def may_retrieve(self, owner: int, version: VersionId) -> bool:
        """Whether a shard is to be fetched: not if it is here, nor if only its owner knows what it may overwrite."""
        slab = self.slab(owner)
        if slab is None:
            return True
        place = retrieval_place(slab.views, version, own=owner in self.own_ranks())
        return place is not None and slab.holding(version) is None

    def retrieval_target(self, owner: int, version: VersionId, data_bytes: int) -> Buffer:
        """The buffer that a shard fetched from a peer goes to."""
        generation, slab = self.generation, self._slab_for(owner, data_bytes)
        with self._lock:
            if self.generation != generation:
                raise ProtocolError(f"is in generation {self.generation}, the retrieval in {generation}")
            for buffer in slab.buffers:
                if buffer.id == version and buffer.state is not BufferState.COMPLETE:
                    return buffer
            index = retrieval_place(slab.views, version, own=owner in self.own_ranks())
            if index is None:
                raise ProtocolError(f"no buffer of rank {owner} may be overwritten yet")
            return slab.buffers[index]

    def complete_buffer(self, owner: int, version: VersionId) -> Buffer | None:
        """See :class:`~lightning_gemini.dataplane.transport.reception.ShardHost`."""
        slab = self.slab(owner)
        return slab.holding(version) if slab else None

    def resume_from(self, version: VersionId | None) -> None:
        """Every rank goes on from ``version``: drop what is newer, it can never be committed any more.

        Nor is it taken in any more, from a peer that has not heard of it yet: it would be kept in place of a version
        that is committed.
        """
        with self._lock:
            self._left_behind, self._resumed = True, version
        for slab in self.slabs():
            for index in superseded(slab.views, version):
                slab.buffers[index].drop()
            for buffer in slab.buffers:
                buffer.forget_origin()

    def abandon_unfinished(self, owner: int) -> None:
        """The worker that wrote this shard died: what it had not finished will never be."""
        slab = self.slab(owner)
        for buffer in slab.buffers if slab else ():
            if buffer.state is BufferState.WRITING and not buffer.retrieved:  # that one is this agent's own work
                buffer.drop()

    def discard(self, owner: int, version: VersionId) -> None:
        """Forget a version whose bytes proved corrupt."""
        buffer = self.complete_buffer(owner, version)
        if buffer is not None:
            buffer.drop()

    def clear(self) -> None:
        """Free all memory."""
        with self._lock:
            slabs, self._slabs = list(self._slabs.values()), {}
            self._job += 1
        for slab in slabs:
            slab.close()

    def _require_wanted(self, owner: int, version: VersionId) -> None:
        newer = self._resumed is None or version > self._resumed
        if self._left_behind and newer and version.generation < self.generation:
            raise ProtocolError(f"wants no version {version.version} of rank {owner}: a recovery went back behind it")

    def _require_hosted(self, owner: int, sender_generation: int) -> None:
        if sender_generation != self.generation:
            raise ProtocolError(f"is in generation {self.generation}, the sender in {sender_generation}")
        placement = self.placement
        if placement is None or self.nproc_per_machine is None:
            raise ProtocolError("not ready: no worker has said yet how shards are placed")
        machine = owner // self.nproc_per_machine
        if machine >= self.machines or self.machine not in placement.holders(machine):
            raise ProtocolError(f"does not hold replicas of rank {owner}")
