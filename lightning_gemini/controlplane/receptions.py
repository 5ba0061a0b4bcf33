"""What workers take in from their peers by themselves (transport ``p2p``): who may write which replica."""

from __future__ import annotations

import threading
from typing import Any

from lightning_gemini.controlplane.control_socket import Reply, WorkerSession
from lightning_gemini.core.recovery import version_from_json
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport.reception import Reception
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import ProtocolError


class Receptions:
    """At most one a connection; it ends with the connection, and what is not complete by then is dropped.

    A worker writes into the agent's memory while it holds a reception, so the memory is nobody else's for so long. A
    process that was killed has written its last byte before its connection is seen to end.

    Args:
        store: Where the replicas are.
    """

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._open: dict[int, Reception] = {}

    def begin(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        """Give out the buffer for a version: its memory goes with the answer.

        Raises:
            GeminiError: It is not wanted here, or the connection has one already.
        """
        kept = request["kept"]
        reception = Reception(
            self._store,
            Frame(
                Kind.BEGIN,
                int(request["owner"]),
                version_from_json(request["id"]),
                int(request["bytes"]),
                sender_generation=int(request["generation"]),
                kept=None if kept is None else version_from_json(kept),
            ),
        )
        if reception.buffer is None:
            reception.end()
            return {"have": True}, ()
        with self._lock:
            taken = id(session) in self._open
            if not taken:
                self._open[id(session)] = reception
        if taken:
            reception.end()
            raise ProtocolError("one replica at a time: end the one that this connection has begun")
        if self._store.generation != int(request["generation"]):  # since it was asked: it missed `give_up`
            reception.give_up()
        return {"have": False}, (reception.buffer.fd,)

    def end(self, session: WorkerSession) -> None:
        """The worker writes no more; idempotent."""
        with self._lock:
            reception = self._open.pop(id(session), None)
        if reception is not None:
            reception.end()

    def give_up(self) -> None:
        """Older generations must not go on writing: workers find that what they write is not wanted, and end."""
        with self._lock:
            receptions = list(self._open.values())
        for reception in receptions:
            reception.give_up()
