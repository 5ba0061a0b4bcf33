"""Publishes versions: copies them into memory off the training thread, and commits them with all other ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from lightning_gemini.callbacks.ranks import MinExchange, RankGroup
from lightning_gemini.core.consistency import writable_buffer
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.shard import Layout
from lightning_gemini.dataplane.slab import Buffer, Slab
from lightning_gemini.dataplane.snapshot import Snapshot, Snapshotter

log = logging.getLogger(__name__)

_POLL_S = 0.0005
_PENDING = -1
_FAILED = -2


class VersionPublisher:
    """One rank's side of the commit protocol (design, Invariant 1).

    A version is *published* when its copy begins, and *committed* once every rank's shard of it is complete on every
    holder. Ranks learn that from a minimum over all ranks that starts before the optimizer step and is read after it,
    so all of them decide alike: the next version may overwrite the older buffer, or it is skipped.

    Args:
        slab: This rank's slab.
        snapshotter: Copies.
        group: All ranks.
        generation: Of this run of the workers.
        replicated: Whether other machines hold copies that must be waited for.
        commit_wait_s: See :class:`~lightning_gemini.config.CheckpointConfig`.
        resumed: The version that memory holds already, if training resumed from it.
        declined: The version that memory holds, if the user's own checkpoint was loaded in its place: it stays until a
            newer one is committed.
        record: Takes what each committed version cost; called on the snapshot thread.
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
        self._exchange: MinExchange | None = None
        self._waited_for: VersionId | None = None
        self._wish = False
        self.persist_wished = False
        self._write_record = record

    # -- around the optimizer step -----------------------------------------------------------------------------------

    def before_step(self, *_: Any) -> None:
        """The optimizer is about to change the state: finish reading it, and start finding out what is committed."""
        began = time.perf_counter()
        if self._snapshot is not None:
            self._snapshot.wait_until_read()
        if self.newest != self.committed and self._exchange is None:
            self._exchange = self._group.start_min([self._complete_here(), -int(self._wish)])
        if self._snapshot is not None:
            self._snapshot.stall_s += time.perf_counter() - began

    def settle(self) -> None:
        """After the step: learn whether the newest version is committed. Collective as long as it is not."""
        if self.newest == self.committed:
            return
        self.before_step()
        assert self._exchange is not None
        assert self.newest is not None
        lowest, wish = self._exchange.wait()
        self._exchange = None
        if lowest == self.newest.version:
            self.committed = self.newest
            self._slab.note_committed(self.newest)
            self.persist_wished, self._wish = bool(wish), False
            self._record(self._snapshot)
        elif lowest == _FAILED:
            self._give_up()

    def ready(self, step: int) -> bool:
        """Whether step ``step`` may be published; if not it is skipped, by all ranks alike."""
        if self.newest == self.committed:
            return True
        self.skipped += 1
        if self.skipped == 1 or self.skipped % 100 == 0:
            newest = self.newest.version if self.newest else -1
            message = "version %d skipped: version %d is not yet complete on all its holders (%d skipped so far)"
            log.warning(message, step, newest, self.skipped)
        return False

    def publish(self, step: int, layout: Layout | None, began: float) -> None:
        """Start copying the state after optimizer step ``step``.

        Args:
            step: Its number; :meth:`ready` said yes.
            layout: The state; ``None`` where it could not be taken, so that all ranks give the version up together.
            began: ``time.perf_counter()`` when the training thread stopped for it.
        """
        index = writable_buffer(self._slab.views, self.committed)
        self.newest = VersionId(self._generation, step)
        self._failed, self._snapshot = layout is None or index is None, None
        if layout is not None and index is not None:
            try:
                self._snapshot = self._snapshotter.begin(self.newest, layout, self._slab.buffers[index])
                self._snapshot.stall_s = time.perf_counter() - began
            except (OSError, MemoryError) as error:
                self._failed = True
                log.warning("version %d failed: %s", step, error)

    def wish_persist(self) -> None:
        """Rank 0 asks that the next committed version also goes to the persistent tier; all ranks learn it together."""
        self._wish = True

    def drain(self) -> None:
        """Finish an exchange that was begun, so that no rank waits for another at the end."""
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None

    def committed_buffer(self) -> Buffer | None:
        """The buffer with the committed version."""
        return self._slab.holding(self.committed) if self.committed else None

    # -- inside ------------------------------------------------------------------------------------------------------

    def _complete_here(self) -> int:
        """This rank's newest version if it is complete on all holders, waiting for it a little."""
        assert self.newest is not None
        # Once a version: a peer that stays away delays one step, not every step.
        patience_s = 0.0 if self._waited_for == self.newest else self._commit_wait_s
        self._waited_for = self.newest
        deadline = time.monotonic() + patience_s
        while not self._failed:
            if self._snapshot is not None and self._snapshot.error is not None:
                log.warning("version %d failed: %s", self.newest.version, self._snapshot.error)
                self._failed = True
            elif self._is_complete(self.newest):
                return self.newest.version
            elif self._is_lost(self.newest):
                log.warning("version %d failed: this rank's copy was damaged in memory", self.newest.version)
                self._failed = True
            elif time.monotonic() > deadline:
                return _PENDING
            else:
                time.sleep(_POLL_S)
        return _FAILED

    def _is_complete(self, version: VersionId) -> bool:
        buffer = self._slab.holding(version)
        return buffer is not None and (not self._replicated or buffer.acked == version)

    def _is_lost(self, version: VersionId) -> bool:
        """Whether what was complete here is not any more: nobody may wait for it."""
        written = self._snapshot is None or self._snapshot.done
        return written and self._slab.holding(version) is None

    def _record(self, snapshot: Snapshot | None) -> None:
        if snapshot is None:  # the version that training resumed from
            return
        costs = {
            "version": snapshot.id.version,
            "generation": snapshot.id.generation,
            "stall_s": snapshot.stall_s,
            "copy_s": snapshot.copy_s,
            "replica_complete_s": snapshot.replica_complete_s if self._replicated else snapshot.copy_s,
            "bytes": snapshot.layout.total_bytes,
            "skipped": self.skipped,
        }
        self._snapshotter.defer(lambda: self._write_record(costs))

    def _give_up(self) -> None:
        """Some rank could not write the newest version: nobody keeps it."""
        for buffer in self._slab.buffers:
            if buffer.id == self.newest:
                buffer.drop()
        self.newest = self.committed
