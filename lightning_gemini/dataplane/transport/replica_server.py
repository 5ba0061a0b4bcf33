"""The other end of a :class:`TcpTransport`: takes in peers' replicas, and gives out what the machine holds."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

from lightning_gemini.dataplane import link_speed, wire
from lightning_gemini.dataplane.transport import chunk_stream
from lightning_gemini.dataplane.transport.chunk_stream import receive_chunks, send_chunks
from lightning_gemini.dataplane.transport.reception import Reception, ShardHost
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import AuthenticationError, GeminiError, ProtocolError

log = logging.getLogger(__name__)

_ACCEPT_RETRY_S = 0.05


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
        elif frame.kind is Kind.PROBE:
            link_speed.discard(sock, frame)
        else:
            raise ProtocolError(f"unexpected {frame.kind.name} frame")

    def _receive_replica(self, sock: socket.socket, begin: Frame) -> None:
        try:
            reception = Reception(self._store, begin)
        except GeminiError as error:
            wire.refuse(sock, begin.owner, begin.id, str(error))
            return
        with reception:
            if reception.buffer is None:
                wire.send(sock, Frame(Kind.HAVE, begin.owner, begin.id))
                return
            wire.send(sock, Frame(Kind.WANT, begin.owner, begin.id))
            # For as long as the sender lives: it may have to wait for its turn on the network, for minutes.
            if receive_chunks(sock, reception.buffer, begin):
                wire.send(sock, Frame(Kind.ACK, begin.owner, begin.id))

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
