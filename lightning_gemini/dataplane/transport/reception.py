"""A shard on its way from a peer into this machine's memory: who may write it, and where; whoever carries the bytes."""

from __future__ import annotations

import threading
from typing import Protocol

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer, BufferState
from lightning_gemini.dataplane.wire import Frame
from lightning_gemini.errors import ProtocolError


class ShardHost(Protocol):
    """What taking in replicas, and giving out shards, needs from the agent's store."""

    def writer(self, owner: int) -> threading.Lock:
        """Whoever holds this lock, and nobody else, writes what comes from peers of this owner's shard."""

    def replica_target(
        self, owner: int, version: VersionId, data_bytes: int, sender_generation: int, kept: VersionId | None
    ) -> Buffer | None:
        """The buffer to receive into, or ``None`` if the version is already complete here.

        Args:
            owner: Global rank whose shard it is.
            version: Its version.
            data_bytes: Its size.
            sender_generation: The generation that the sender is in.
            kept: The complete version that the owner holds beside it; what is in between was given up by all ranks.

        Raises:
            GeminiError: The replica is not wanted here (wrong owner, stale generation, older than all, no memory).
        """

    def recheck(self, owner: int, version: VersionId) -> bool:
        """Read every byte of a complete version again; a damaged one is dropped. Says whether it is still there."""

    def complete_buffer(self, owner: int, version: VersionId) -> Buffer | None:
        """The complete buffer with this version, if held."""


class Reception:
    """The right to write one owner's shard, from what a BEGIN frame announced until :meth:`end`.

    Args:
        store: Where the shard goes.
        begin: What the sender announced.

    Attributes:
        buffer: Begun, to be filled; ``None`` where the version is complete here already.

    Raises:
        GeminiError: Somebody else writes this owner's shard, or the version is not wanted here.
    """

    def __init__(self, store: ShardHost, begin: Frame) -> None:
        self._begin, self._writing = begin, store.writer(begin.owner)
        if not self._writing.acquire(blocking=False):  # being retrieved, or an older transfer is still being torn down
            raise ProtocolError(f"is still receiving the shard of rank {begin.owner}")
        self._ended = threading.Lock()
        try:
            self.buffer = self._target(store)
            if self.buffer is None and not store.recheck(begin.owner, begin.id):
                self.buffer = self._target(store)  # it was damaged: here comes a good one
        except BaseException:
            self._writing.release()
            raise

    def _target(self, store: ShardHost) -> Buffer | None:
        begin = self._begin
        return store.replica_target(begin.owner, begin.id, begin.size, begin.sender_generation, begin.kept)

    def give_up(self) -> None:
        """Let whoever fills the buffer find that it is not wanted any more; what is complete stays."""
        buffer = self.buffer
        if buffer is not None and buffer.id == self._begin.id and buffer.state is not BufferState.COMPLETE:
            buffer.drop()

    def end(self) -> None:
        """Nobody writes any more: what is not complete by now is dropped. Idempotent; any thread."""
        if self._ended.acquire(blocking=False):
            self.give_up()
            self._writing.release()

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
