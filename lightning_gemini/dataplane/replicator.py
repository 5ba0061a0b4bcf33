"""Keeps the peers that hold this machine's shards up to date: one thread a peer, always the newest version."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer, BufferState
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, ReplicaTransport

log = logging.getLogger(__name__)

_RETRY_S = 0.2
_IDLE_S = 0.5
_PATIENCE_S = 3.0  # peers that are just starting refuse for a moment


class Replicator:
    """Level-triggered: whatever was missed, by a broken link or a restart, is sent as soon as it can be.

    Args:
        store: Where the shards are.
        connect: Makes a transport to a peer.
    """

    def __init__(self, store: ShardStore, connect: Callable[[Peer], ReplicaTransport]) -> None:
        self._store, self._connect = store, connect
        self._wake = threading.Condition()
        self._epoch = 0
        self._held: dict[tuple[int, int], VersionId] = {}  # (owner, machine) -> newest version seen complete there
        self._transports: set[ReplicaTransport] = set()

    def start(self, peers: Sequence[Peer]) -> None:
        """Serve these peers from now on, and no others."""
        with self._wake:
            self._epoch += 1
            self._held.clear()
            self._wake.notify_all()
            for peer in peers:
                arguments = (peer, self._epoch)
                threading.Thread(
                    target=self._run, args=arguments, name=f"replicate-{peer.machine}", daemon=True
                ).start()

    def close(self) -> None:
        """Stop sending; idempotent."""
        self.start(())

    def notify(self) -> None:
        """A rank began a version, or completed one."""
        with self._wake:
            self._wake.notify_all()
        self._acknowledge()

    def _run(self, peer: Peer, epoch: int) -> None:
        transport: ReplicaTransport | None = None
        failing_since: float | None = None
        warned = False
        while self._epoch == epoch:
            buffer = self._next_for(peer)
            if buffer is None:
                with self._wake:
                    if self._epoch == epoch and self._next_for(peer) is None:
                        self._wake.wait(_IDLE_S)
                continue
            try:
                transport = transport or self._connect(peer)
                self._push(transport, buffer, peer, epoch)
                failing_since, warned = None, False
            except OSError as error:
                failing_since = failing_since or time.monotonic()
                if not warned and time.monotonic() - failing_since > _PATIENCE_S:
                    warned = True  # once, then silence until it works again
                    log.warning("cannot replicate to machine %d, retrying: %s", peer.machine, error)
                if transport is not None:
                    transport.close()
                transport = None
                with self._wake:
                    self._wake.wait(_RETRY_S)
        if transport is not None:
            transport.close()

    def _push(self, transport: ReplicaTransport, buffer: Buffer, peer: Peer, epoch: int) -> None:
        version = buffer.id
        if version is None:
            return
        if transport.push(buffer, version, lambda: self._epoch == epoch and buffer.state is not BufferState.EMPTY):
            self._held[buffer.owner, peer.machine] = version
            self._acknowledge()

    def _next_for(self, peer: Peer) -> Buffer | None:
        """The first own shard whose newest version this peer should hold and does not."""
        for owner in self._store.own_ranks():
            slab = self._store.slab(owner)
            buffer = slab.newest_started() if slab else None
            if buffer is None or peer.machine not in self._holders():
                continue
            version = buffer.id
            if version is not None and self._held.get((owner, peer.machine)) != version:
                return buffer
        return None

    def _holders(self) -> tuple[int, ...]:
        placement = self._store.placement
        return placement.holders(self._store.machine)[1:] if placement else ()

    def _acknowledge(self) -> None:
        """Tell every rank whose newest version is complete on all its holders, so that it may commit."""
        if self._store.placement is None:
            return
        holders = self._holders()
        for owner in self._store.own_ranks():
            slab = self._store.slab(owner)
            for buffer in slab.complete() if slab else ():
                version = buffer.id
                if version and buffer.acked != version and self._all_hold(owner, version, holders):
                    buffer.acknowledge(version)

    def _all_hold(self, owner: int, version: VersionId, holders: tuple[int, ...]) -> bool:
        return all(self._held.get((owner, machine)) == version for machine in holders)
