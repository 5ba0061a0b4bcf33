"""Publishes versions: copies them into memory off the training thread, and commits them with all other ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

from lightning_gemini.callbacks.ranks import RankGroup
from lightning_gemini.callbacks.votes import Votes
from lightning_gemini.core.consistency import BufferView, writable_buffer
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.shard import Draft
from lightning_gemini.dataplane.slab import Buffer, Slab
from lightning_gemini.dataplane.snapshot import Snapshot, Snapshotter
from lightning_gemini.errors import CapacityError

log = logging.getLogger(__name__)

_POLL_S = 0.0005
_PENDING = -1
_FAILED = -2


class VersionPublisher:
    """One rank's side of the commit protocol (design, Invariant 1).

    A version is *published* when its copy begins, and *committed* once every rank's shard of it is complete on every
    holder. Ranks learn that from a minimum over all ranks that starts with the optimizer step and is read after it, so
    all of them decide alike: the next version may overwrite the older buffer, or it is skipped.

    Args:
        slab: This rank's slab.
        snapshotter: Copies.
        group: All ranks; used by nobody else, as votes are cast on the snapshot thread.
        generation: Of this run of the workers.
        replicated: Whether other machines hold copies that must be waited for.
        commit_wait_s: See :class:`~lightning_gemini.config.CheckpointConfig`.
        resumed: The version that memory holds already, if training resumed from it.
        declined: The version that memory holds, if the user's own checkpoint was loaded in its place: it stays until a
            newer one is committed.
        record: Takes what each committed version cost; called on the snapshot thread.

    Attributes:
        newest: The version published last.
        committed: The newest version that all ranks know to be committed.
        skipped: Versions that were due and not taken.
        patient: Whether the coming vote waits for the newest version's replicas: the version after it is due then.
        votes: This rank's.
        agreed: The outcome of the vote that came with the version that was just committed.
        costs: What goes into each version's record besides times.
    """

    def __init__(
        self,
        slab: Slab,
        snapshotter: Snapshotter,
        group: RankGroup,
        generation: int,
        *,
        replicated: bool,
        commit_wait_s: float,
        resumed: VersionId | None,
        declined: VersionId | None,
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        self._slab, self._snapshotter, self._group = slab, snapshotter, group
        self._generation, self._replicated, self._commit_wait_s = generation, replicated, commit_wait_s
        self.newest: VersionId | None = resumed or declined
        self.committed: VersionId | None = declined
        if declined is not None:
            slab.note_committed(declined)
        self.skipped = 0
        self._snapshot: Snapshot | None = None
        self._failed = False
        self._voting = False
        self._outcomes: SimpleQueue[list[int] | Exception] = SimpleQueue()
        self._waited_for: VersionId | None = None
        self.patient = True
        self.votes, self.agreed = Votes(), Votes()
        self.costs: dict[str, Any] = {}
        self._write_record = record

    # -- around the optimizer step -----------------------------------------------------------------------------------

    def before_step(self, *_: Any) -> None:
        """The optimizer is about to change the state: finish reading it, and start finding out what is committed."""
        began = time.perf_counter()
        self.wait_until_read()
        if not self.settled and not self._voting:
            self._voting = True
            self._snapshotter.run(self._vote)
        self._add_stall(began)

    def wait_until_read(self) -> None:
        """Until nobody reads training's state any more."""
        if self._snapshot is not None:
            self._snapshot.wait_until_read()

    def settle(self) -> bool:
        """After the step: learn whether the newest version is committed. Collective as long as it is not.

        Returns:
            Whether it was learnt just now.
        """
        self.agreed = Votes()
        if self.settled:
            return False
        self.before_step()
        began = time.perf_counter()
        assert self.newest is not None
        lowest, *minima = self._outcome_of_vote()
        self._add_stall(began)
        if lowest == self.newest.version:
            self.committed = self.newest
            self.agreed = Votes.counted(minima)
            if self.agreed.persist:
                self.votes.persist = False
            self._slab.note_committed(self.newest)
            self._record(self._snapshot)
            return True
        if lowest == _FAILED:
            self._give_up()
        return False

    @property
    def waited_s(self) -> float:
        """Seconds that the version published last was waited for at its holders."""
        return self._snapshot.wait_s if self._snapshot is not None else 0.0

    @property
    def settled(self) -> bool:
        """Whether the newest version is committed, so that nothing of it is on its way any more."""
        return self.newest == self.committed

    def ready(self, step: int) -> bool:
        """Whether step ``step`` may be published; if not it is skipped, by all ranks alike."""
        if self.settled:
            return True
        self.skipped += 1
        if self.skipped == 1 or self.skipped % 100 == 0:
            newest = self.newest.version if self.newest else -1
            message = "version %d skipped: version %d is not yet complete on all its holders (%d skipped so far)"
            log.warning(message, step, newest, self.skipped)
        return False

    def publish(self, step: int, draft: Draft | None, began: float) -> None:
        """Start copying the state after optimizer step ``step``.

        Args:
            step: Its number; :meth:`ready` said yes.
            draft: The state; ``None`` where it could not be taken, so that all ranks give the version up together.
            began: ``time.perf_counter()`` when the training thread stopped for it.
        """
        self.newest = VersionId(self._generation, step)
        self._slab.pace.rush(False)
        self._slab.pace.restart_sent()
        self._failed, self._snapshot = draft is None, None
        if draft is not None:
            self._snapshot = self._snapshotter.begin(self.newest, draft, partial(self._writable, self.committed))
            self._snapshot.stall_s = time.perf_counter() - began

    def wait_for_holders(self) -> None:
        """Stop training until the version just published is complete on all its holders, or ``commit_wait_s`` is over.

        Scheme ``blocking``.
        """
        began = time.perf_counter()
        self.wait_until_read()
        self._wait_for_holders(self._commit_wait_s)
        self._add_stall(began)

    def drain(self) -> None:
        """Finish an exchange that was begun, so that no rank waits for another at the end."""
        if self._voting:
            self._outcome_of_vote()

    def committed_buffer(self) -> Buffer | None:
        """The buffer with the committed version."""
        return self._slab.holding(self.committed) if self.committed else None

    # -- inside ------------------------------------------------------------------------------------------------------

    def _writable(self, committed: VersionId | None) -> Buffer:
        index = writable_buffer(self._slab.views, committed)
        if index is None:
            raise CapacityError("both buffers hold versions that may be needed yet; training goes on, and tries again")
        return self._slab.buffers[index]

    def _vote(self) -> None:
        """Learns from all ranks what is complete; on the snapshot thread, while the optimizer takes its step."""
        try:
            self._outcomes.put(self._group.minimum([self._complete_here(), *self.votes.cast()]))
        except Exception as error:  # the training thread waits for this one, whatever happens
            self._outcomes.put(error)

    def _outcome_of_vote(self) -> list[int]:
        outcome = self._outcomes.get()
        self._voting = False
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _complete_here(self) -> int:
        """This rank's newest version if it is complete on all holders, waiting for it a little where it must be."""
        # Once a version: a peer that stays away delays one step, not every step.
        patient = self.patient and self._waited_for != self.newest
        if patient:
            self._waited_for = self.newest
        return self._wait_for_holders(self._commit_wait_s if patient else 0.0)

    def _wait_for_holders(self, patience_s: float) -> int:
        assert self.newest is not None
        began = time.monotonic()
        try:
            while (outcome := self._outcome()) == _PENDING and time.monotonic() < began + patience_s:
                self._slab.pace.rush(True)  # what the idle spans did not carry goes now
                time.sleep(_POLL_S)
            return outcome
        finally:
            if self._snapshot is not None:
                self._snapshot.wait_s += time.monotonic() - began

    def _outcome(self) -> int:
        """What this rank knows of its newest version."""
        newest = self.newest
        assert newest is not None
        if not self._failed and self._snapshot is not None and self._snapshot.error is not None:
            log.warning("version %d failed: %s", newest.version, self._snapshot.error)
            self._failed = True
        if self._failed:
            return _FAILED
        if self._is_complete(newest):
            return newest.version
        if self._is_lost(newest):
            log.warning("version %d failed: this rank's copy was damaged in memory", newest.version)
            self._failed = True
            return _FAILED
        return _PENDING

    def _is_complete(self, version: VersionId) -> bool:
        buffer = self._snapshot.buffer if self._snapshot is not None else self._slab.holding(version)
        if buffer is None or (self._replicated and buffer.acked != version):
            return False
        return buffer.view == BufferView(id=version, complete=True)

    def _is_lost(self, version: VersionId) -> bool:
        """Whether what was complete here is not any more: nobody may wait for it."""
        written = self._snapshot is None or self._snapshot.done
        return written and self._slab.holding(version) is None

    def _add_stall(self, began: float) -> None:
        if self._snapshot is not None:
            self._snapshot.stall_s += time.perf_counter() - began

    def _record(self, snapshot: Snapshot | None) -> None:
        if snapshot is None:  # the version that training resumed from
            return
        costs = {
            "version": snapshot.id.version,
            "generation": snapshot.id.generation,
            "stall_s": snapshot.stall_s,
            "wait_s": snapshot.wait_s,
            "copy_s": snapshot.copy_s,
            "replica_complete_s": snapshot.replica_complete_s if self._replicated else snapshot.copy_s,
            "bytes": snapshot.bytes,
            "skipped": self.skipped,
            "peak_buffer_bytes": self._slab.pace.take_peak(),
            **self.costs,
        }
        self._snapshotter.defer(lambda: self._write_record(costs))

    def _give_up(self) -> None:
        """Some rank could not write the newest version: nobody keeps it."""
        for buffer in self._slab.buffers:
            if buffer.id == self.newest:
                buffer.drop()
        self.newest = self.committed
