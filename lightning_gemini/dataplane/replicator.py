"""Keeps the peers that hold this machine's shards up to date: a thread for each of both, always the newest version."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.pace_page import PacePage
from lightning_gemini.dataplane.pacer import Pacer
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
        self._news = 0  # counts what threads must look at; guards against a wake-up that comes before the wait
        self._epoch = 0
        self._peers: list[Peer] = []
        self._links: list[_Link] = []
        self._held: dict[tuple[int, int], VersionId] = {}  # (owner, machine) -> newest version seen complete there
        self._pacers: dict[int, Pacer] = {}  # by owner, whose links to all holders share what it allows
        self._checked: dict[int, VersionId] = {}  # owner -> version whose own copy was read again after a failure

    def start(self, peers: Sequence[Peer]) -> None:
        """Serve these peers from now on, and no others; nothing is known of what they hold."""
        with self._wake:
            self._epoch += 1
            self._held.clear()
            self._checked.clear()
            self._pacers.clear()
            self._announce()
            for link in self._links:
                link.abort()
            self._peers, self._links = list(peers), []
            self._open_links()

    def close(self) -> None:
        """Stop sending; idempotent."""
        self.start(())

    def notify(self) -> None:
        """A rank began a version, or completed one; or the placement became known."""
        with self._wake:
            self._open_links()
            self._announce()
            self._acknowledge()

    def note_held(self, owner: int, machine: int, version: VersionId, generation: int) -> None:
        """A worker sent a version by itself: ``machine`` has it, as of a generation, and whatever older ones said."""
        with self._wake:
            if generation == self._store.generation:
                self._held[owner, machine] = version
                self._acknowledge()

    def _open_links(self) -> None:
        """Starts a thread for every own shard and peer that holds it, and for no other: a job has many machines.

        Who that is may not be known when the peers are: the first worker that joins says so. Each shard has a
        connection of its own, as ranks that took turns on one would miss each other's idle spans.
        """
        linked = {(link.owner, link.peer.machine) for link in self._links}
        holders = self._holders() if self._peers else ()
        for peer in self._peers if holders else ():
            for owner in self._store.own_ranks() if peer.machine in holders else ():
                if (owner, peer.machine) not in linked:
                    self._open_link(owner, peer)

    def _open_link(self, owner: int, peer: Peer) -> None:
        link = _Link(owner, peer, self._connect)
        self._links.append(link)
        name = f"replicate-{peer.machine}"
        threading.Thread(target=self._run, args=(link, self._epoch), name=name, daemon=True).start()

    def _announce(self) -> None:
        self._news += 1
        self._wake.notify_all()

    def _run(self, link: _Link, epoch: int) -> None:
        while self._epoch == epoch:
            news = self._news
            pause_s = self._serve(link, epoch)
            with self._wake:
                if pause_s and self._epoch == epoch and self._news == news:
                    self._wake.wait(pause_s)
        link.close()

    def _serve(self, link: _Link, epoch: int) -> float:
        """Send one thing that the peer lacks; returns how long to wait for news before the next look."""
        buffer: Buffer | None = None
        try:
            buffer = self._next_for(link)
            if buffer is None:
                with self._wake:
                    self._acknowledge()  # again, should memory have lost what was noted
                return _IDLE_S
            self._push(link, buffer, epoch)
            link.succeeded()
            return 0.0
        except Exception as error:  # a peer must be served again whatever happened
            if self._epoch == epoch:
                link.failed(error)
                self._recheck(buffer)
            return _RETRY_S

    def _recheck(self, buffer: Buffer | None) -> None:
        """Nobody takes a version whose bytes are corrupt here: so after a failure each is read again, once."""
        version = buffer.id if buffer is not None else None
        if buffer is None or version is None or self._checked.get(buffer.owner) == version:
            return
        if buffer.state is BufferState.COMPLETE:
            self._checked[buffer.owner] = version
            self._store.recheck(buffer.owner, version)

    def _push(self, link: _Link, buffer: Buffer, epoch: int) -> None:
        version = buffer.id
        if version is None:
            return
        slab = self._store.slab(buffer.owner)
        kept = slab.kept_beside(version) if slab is not None else None
        pacer = self._pacer(buffer.owner)

        def still_wanted() -> bool:
            return self._epoch == epoch and buffer.state is not BufferState.EMPTY and not pacer.page.held

        wanted = link.transport().push(buffer, version, still_wanted, kept, pacer)
        with self._wake:
            if wanted and self._epoch == epoch:  # else another machine may have this rank by now
                self._held[buffer.owner, link.peer.machine] = version
                self._acknowledge()

    def _pacer(self, owner: int) -> Pacer:
        slab = self._store.slab(owner)
        page = slab.pace if slab is not None else PacePage.private()
        with self._wake:
            pacer = self._pacers.get(owner)
            if pacer is None or pacer.page is not page:
                pacer = self._pacers[owner] = Pacer(page)
            return pacer

    def _next_for(self, link: _Link) -> Buffer | None:
        """The newest version of the link's shard, if its peer should hold it and does not; unless the worker sends."""
        slab = self._store.slab(link.owner)
        buffer = slab.newest_started() if slab else None
        if slab is None or buffer is None or slab.pace.held or link.peer.machine not in self._holders():
            return None
        version = buffer.id
        lacking = version is not None and self._held.get((link.owner, link.peer.machine)) != version
        return buffer if lacking else None

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
                    buffer.acknowledge(version, time.monotonic_ns())

    def _all_hold(self, owner: int, version: VersionId, holders: tuple[int, ...]) -> bool:
        return all(self._held.get((owner, machine)) == version for machine in holders)


class _Link:
    """The way of one shard to one peer, and how it fares."""

    def __init__(self, owner: int, peer: Peer, connect: Callable[[Peer], ReplicaTransport]) -> None:
        self.owner, self.peer, self._connect = owner, peer, connect
        self._transport: ReplicaTransport | None = None
        self._failing_since: float | None = None
        self._warned = False

    def transport(self) -> ReplicaTransport:
        self._transport = self._transport or self._connect(self.peer)
        return self._transport

    def succeeded(self) -> None:
        self._failing_since, self._warned = None, False

    def failed(self, error: Exception) -> None:
        """Warn once, then be silent until it works again."""
        self.close()
        self._failing_since = self._failing_since or time.monotonic()
        unexpected = not isinstance(error, OSError)
        if not self._warned and (unexpected or time.monotonic() - self._failing_since > _PATIENCE_S):
            self._warned = True
            message = "cannot replicate to machine %d, retrying: %s"
            log.warning(message, self.peer.machine, error, exc_info=error if unexpected else None)

    def abort(self) -> None:
        transport = self._transport
        if transport is not None:
            transport.abort()

    def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
