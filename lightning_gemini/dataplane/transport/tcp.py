"""Agent to agent over TCP, straight from one machine's shared memory into another's."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

import xxhash

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.slab import Buffer, BufferState
from lightning_gemini.dataplane.transport.base import Peer
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import AuthenticationError, GeminiError, IntegrityError, ProtocolError

log = logging.getLogger(__name__)

IO_TIMEOUT_S = 20.0
_POLL_S = 0.001
_ACCEPT_RETRY_S = 0.05


class TcpTransport:
    """The client side: one authenticated connection, opened on first use.

    Args:
        peer: Whom to talk to.
        job: The job's id.
        secret: The job's secret.
        machine: This machine's rank.
        generation: The generation that this machine is in; the peer refuses one that is over.
    """

    def __init__(self, peer: Peer, job: str, secret: bytes, machine: int, generation: int) -> None:
        self._peer, self._job, self._secret, self._machine = peer, job, secret, machine
        self._generation = generation
        self._sock: socket.socket | None = None
        self._aborted = False

    def push(
        self, buffer: Buffer, version: VersionId, still_wanted: Callable[[], bool], kept: VersionId | None = None
    ) -> bool:
        """See :class:`ReplicaTransport`."""
        with _closing_on_error(self):
            sock = self._connected()
            begin = Frame(Kind.BEGIN, buffer.owner, version, buffer.data_bytes, buffer.chunk_bytes)
            wire.send(sock, dataclasses.replace(begin, sender_generation=self._generation, kept=kept))
            if self._answer(sock, (Kind.WANT, Kind.HAVE)).kind is Kind.HAVE:
                return True
            finished = send_chunks(sock, buffer, version, still_wanted)
            wire.send(sock, Frame(Kind.END if finished else Kind.ABORT, buffer.owner, version))
            return finished and self._answer(sock, (Kind.ACK,)).kind is Kind.ACK

    def fetch(self, owner: int, version: VersionId, allocate: Callable[[int], Buffer]) -> int:
        """See :class:`ReplicaTransport`."""
        with _closing_on_error(self):
            sock = self._connected()
            wire.send(sock, Frame(Kind.FETCH, owner, version))
            begin = self._answer(sock, (Kind.BEGIN,))
            if (begin.owner, begin.id) != (owner, version):
                raise ProtocolError(f"machine {self._peer.machine} sends another shard than it was asked for")
            buffer = allocate(begin.size)
            buffer.begin(version, begin.size, retrieved=True)
            if not receive_chunks(sock, buffer, begin):
                raise ProtocolError(f"machine {self._peer.machine} gave up sending the shard of rank {owner}")
            return begin.size

    def close(self) -> None:
        """See :class:`ReplicaTransport`."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def abort(self) -> None:
        """See :class:`ReplicaTransport`."""
        self._aborted = True
        sock = self._sock
        if sock is not None:  # not closed here: its number could be another file's before the other thread looks
            _quietly(lambda: sock.shutdown(socket.SHUT_RDWR))

    def _connected(self) -> socket.socket:
        if self._aborted:
            raise ConnectionError(f"the connection to machine {self._peer.machine} was given up")
        if self._sock is None:
            self._sock = wire.connect(
                self._peer.address, self._job, self._secret, self._machine, timeout_s=IO_TIMEOUT_S
            )
        if self._aborted:  # while it connected
            raise ConnectionError(f"the connection to machine {self._peer.machine} was given up")
        return self._sock

    def _answer(self, sock: socket.socket, expected: tuple[Kind, ...]) -> Frame:
        try:
            frame = wire.receive(sock)
        except EOFError as error:
            raise ConnectionError(f"machine {self._peer.machine} closed the connection") from error
        if frame.kind is Kind.REFUSE:
            raise ProtocolError(f"machine {self._peer.machine} refused: {wire.receive_reason(sock, frame)}")
        if frame.kind not in expected:
            raise ProtocolError(f"machine {self._peer.machine} answered {frame.kind.name}, expected {expected}")
        return frame


class _closing_on_error:  # noqa: N801 - reads as a verb in a with statement
    def __init__(self, transport: TcpTransport) -> None:
        self._transport = transport

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._transport.close()


def send_chunks(sock: socket.socket, buffer: Buffer, version: VersionId, still_wanted: Callable[[], bool]) -> bool:
    """Send every chunk as soon as it is sealed; false when the version is given up on the way."""
    for index in range(buffer.chunks):
        while buffer.chunks_ready <= index or buffer.id != version:
            if buffer.id != version or not still_wanted():
                return False
            time.sleep(_POLL_S)
        chunk = buffer.chunk(index)
        frame = Frame(Kind.CHUNK, buffer.owner, version, index, 0, len(chunk), buffer.checksum(index))
        wire.send(sock, frame, chunk)
    return buffer.id == version


def receive_chunks(sock: socket.socket, buffer: Buffer, begin: Frame) -> bool:
    """Fill a buffer that was begun, verify every chunk, and complete it; false when the sender aborted.

    Raises:
        IntegrityError: A chunk does not match its checksum.
        ProtocolError: Chunks out of order or of the wrong size.
        OSError: The connection broke.
    """
    try:
        while (frame := wire.receive(sock)).kind is Kind.CHUNK:
            index = buffer.chunks_ready
            if (frame.owner, frame.id, frame.size) != (begin.owner, begin.id, index) or index >= buffer.chunks:
                raise ProtocolError(f"chunk {frame.size} of rank {frame.owner} came out of turn")
            target = buffer.chunk(index)
            if frame.length != len(target):
                raise ProtocolError(f"chunk {index} has {frame.length} bytes, expected {len(target)}")
            wire.receive_into(sock, target)
            if xxhash.xxh3_64_intdigest(target) != frame.checksum:
                raise IntegrityError(f"chunk {index} of rank {begin.owner}'s shard was corrupted on the way")
            buffer.seal_chunk(index, frame.checksum)
        if frame.kind is Kind.END:
            buffer.complete()
            return True
        if frame.kind is not Kind.ABORT:
            raise ProtocolError(f"unexpected {frame.kind.name} frame while receiving a shard")
        return False
    except EOFError as error:
        raise ConnectionError(f"the peer closed the connection in the middle of rank {begin.owner}'s shard") from error
    finally:
        if buffer.state is not BufferState.COMPLETE:
            buffer.drop()


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
            GeminiError: The replica is not wanted here (wrong owner, stale generation, no memory).
        """

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
            _quietly(lambda: listener.shutdown(socket.SHUT_RDWR))
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
            _quietly(lambda sock=sock: sock.shutdown(socket.SHUT_RDWR))  # type: ignore[misc]

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
                wire.accept(sock, self._job, self._secret, timeout_s=None)
                while True:
                    self._handle(sock, wire.receive(sock))
        except EOFError:
            pass
        except AuthenticationError as error:
            if self._is_first_refusal(peer):  # one line a peer, however often it tries
                log.warning("refused a connection: %s", error)
        except Exception as error:  # whatever a peer or its disconnection causes ends this connection alone
            expected = isinstance(error, (GeminiError, OSError)) or self._listener is None
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
            buffer = self._store.replica_target(begin.owner, begin.id, begin.size, begin.sender_generation, begin.kept)
        except GeminiError as error:
            wire.refuse(sock, begin.owner, begin.id, str(error))
            return
        if buffer is None:
            wire.send(sock, Frame(Kind.HAVE, begin.owner, begin.id))
            return
        sock.settimeout(IO_TIMEOUT_S)
        wire.send(sock, Frame(Kind.WANT, begin.owner, begin.id))
        if receive_chunks(sock, buffer, begin):
            wire.send(sock, Frame(Kind.ACK, begin.owner, begin.id))
        sock.settimeout(None)

    def _send_shard(self, sock: socket.socket, request: Frame) -> None:
        buffer = self._store.complete_buffer(request.owner, request.id)
        if buffer is None:
            wire.refuse(sock, request.owner, request.id, f"does not hold {request.id} of rank {request.owner}")
            return
        sock.settimeout(IO_TIMEOUT_S)
        wire.send(sock, Frame(Kind.BEGIN, request.owner, request.id, buffer.data_bytes, buffer.chunk_bytes))
        finished = send_chunks(sock, buffer, request.id, lambda: True)
        wire.send(sock, Frame(Kind.END if finished else Kind.ABORT, request.owner, request.id))
        sock.settimeout(None)


def _quietly(action: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        action()
