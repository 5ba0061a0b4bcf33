"""The other end of a :class:`TcpTransport`: takes in peers' replicas, and gives out what the machine holds."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Protocol

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.transport import chunk_stream
from lightning_gemini.dataplane.transport.chunk_stream import receive_chunks, send_chunks
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import AuthenticationError, GeminiError, ProtocolError

log = logging.getLogger(__name__)

_ACCEPT_RETRY_S = 0.05


class ShardHost(Protocol):
    """What the server needs from the agent's store."""

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


class ReplicaServer:
    """Accepts peers' replicas into the store and serves shards to peers that retrieve them.

    Args:
        host: Interface to bind to.
        job: The job's id.
        secret: The job's secret.
        store: Where shards live.
    """

    def __init__(self, host: str, job: str, secret: bytes, store: ShardHost) -> None:
        self._host, self._job, self._secret, self._store = host, job, secret, store
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._refused: set[str] = set()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that peers connect to."""
        assert self._listener is not None
        host, port = self._listener.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Bind and start accepting.

        Raises:
            OSError: The interface cannot be bound.
        """
        self._listener = socket.create_server((self._host, 0), backlog=64)
        threading.Thread(target=self._accept, name="replica-server", daemon=True).start()

    def close(self) -> None:
        """Stop accepting and drop every connection; idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # shutdown() wakes the accept() of the other thread; close() alone would not
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.disconnect()

    def set_secret(self, secret: bytes) -> None:
        """Accept only peers that know this secret from now on."""
        self._secret = secret

    def disconnect(self) -> None:
        """Drop every connection; peers connect again."""
        with self._lock:
            connections, self._connections = self._connections, set()
        for sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None and self._listener is listener:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed, or short of descriptors for a moment
                time.sleep(_ACCEPT_RETRY_S)
                continue
            threading.Thread(target=self._serve, args=(sock,), name="replica-connection", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        peer = "a peer"
        with self._lock:
            self._connections.add(sock)
        try:
            with sock:
                if self._listener is None:  # closed meanwhile
                    return
                peer = str(sock.getpeername()[0])
                peer = f"machine {wire.accept(sock, self._job, self._secret, timeout_s=None)} ({peer})"
                while True:
                    self._handle(sock, wire.receive(sock))
        except EOFError:
            pass
        except AuthenticationError as error:
            if self._is_first_refusal(peer):  # one line a peer, however often it tries
                log.warning("refused a connection: %s", error)
        except GeminiError as error:  # it spoke out of turn, or what it sent was damaged
            level = logging.WARNING if self._is_first_refusal(peer) else logging.DEBUG
            log.log(level, "ended a connection from %s: %s (said once)", peer, error)
        except Exception as error:  # whatever a peer or its disconnection causes ends this connection alone
            expected = isinstance(error, OSError) or self._listener is None
            level = logging.DEBUG if expected else logging.ERROR
            log.log(level, "connection from %s ended: %s", peer, error, exc_info=not expected)
        finally:
            with self._lock:
                self._connections.discard(sock)

    def _is_first_refusal(self, peer: str) -> bool:
        with self._lock:
            known = peer in self._refused
            self._refused.add(peer)
        return not known

    def _handle(self, sock: socket.socket, frame: Frame) -> None:
        if frame.kind is Kind.BEGIN:
            self._receive_replica(sock, frame)
        elif frame.kind is Kind.FETCH:
            self._send_shard(sock, frame)
        else:
            raise ProtocolError(f"unexpected {frame.kind.name} frame")

    def _receive_replica(self, sock: socket.socket, begin: Frame) -> None:
        receiving = self._store.writer(begin.owner)
        if not receiving.acquire(blocking=False):  # being retrieved, or an older connection is still being torn down
            wire.refuse(sock, begin.owner, begin.id, f"is still receiving the shard of rank {begin.owner}")
            return
        try:
            self._receive_into_store(sock, begin)
        finally:
            receiving.release()

    def _receive_into_store(self, sock: socket.socket, begin: Frame) -> None:
        try:
            buffer = self._target(begin)
            if buffer is None and not self._store.recheck(begin.owner, begin.id):
                buffer = self._target(begin)  # it was damaged: here comes a good one
        except GeminiError as error:
            wire.refuse(sock, begin.owner, begin.id, str(error))
            return
        if buffer is None:
            wire.send(sock, Frame(Kind.HAVE, begin.owner, begin.id))
            return
        sock.settimeout(chunk_stream.IO_TIMEOUT_S)
        wire.send(sock, Frame(Kind.WANT, begin.owner, begin.id))
        if receive_chunks(sock, buffer, begin):
            wire.send(sock, Frame(Kind.ACK, begin.owner, begin.id))
        sock.settimeout(None)

    def _target(self, begin: Frame) -> Buffer | None:
        return self._store.replica_target(begin.owner, begin.id, begin.size, begin.sender_generation, begin.kept)

    def _send_shard(self, sock: socket.socket, request: Frame) -> None:
        buffer = self._store.complete_buffer(request.owner, request.id)
        if buffer is None:
            wire.refuse(sock, request.owner, request.id, f"does not hold {request.id} of rank {request.owner}")
            return
        sock.settimeout(chunk_stream.IO_TIMEOUT_S)
        wire.send(sock, Frame(Kind.BEGIN, request.owner, request.id, buffer.data_bytes, buffer.chunk_bytes))
        finished = send_chunks(sock, buffer, request.id, lambda: True)
        wire.send(sock, Frame(Kind.END if finished else Kind.ABORT, request.owner, request.id))
        sock.settimeout(None)
