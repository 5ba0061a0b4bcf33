"""The agent's memory, as a worker that takes in a peer's shard sees it."""

from __future__ import annotations

import contextlib
import os

from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.wire import Frame


class AgentDesk:
    """See :class:`~lightning_gemini.dataplane.transport.p2p_receiver.ReplicaDesk`.

    Args:
        client: A connection of its own: what it has begun ends with it.
    """

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self._mapped: dict[int, Buffer] = {}  # by inode: mapping gigabytes takes a while

    def begin(self, begin: Frame) -> Buffer | None:
        """See :class:`~lightning_gemini.dataplane.transport.p2p_receiver.ReplicaDesk`."""
        descriptor = self._client.replica_begin(begin.owner, begin.id, begin.size, begin.sender_generation, begin.kept)
        return None if descriptor is None else self._map(descriptor, begin.size)

    def _map(self, descriptor: int, data_bytes: int) -> Buffer:
        inode = os.fstat(descriptor).st_ino
        buffer = self._mapped.get(inode)
        if buffer is None:
            buffer = self._mapped[inode] = Buffer(descriptor)
            return buffer
        os.close(descriptor)
        if not buffer.fits(data_bytes):
            buffer.remap()
        return buffer

    def end(self) -> None:
        """See :class:`~lightning_gemini.dataplane.transport.p2p_receiver.ReplicaDesk`."""
        self._client.replica_end()

    def close(self) -> None:
        """Hang up and let go of the memory; idempotent."""
        self._client.close()
        for buffer in self._mapped.values():
            with contextlib.suppress(OSError):
                buffer.close()
        self._mapped.clear()
