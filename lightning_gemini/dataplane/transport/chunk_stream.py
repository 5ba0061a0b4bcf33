"""A shard on a socket, chunk by chunk, each with its checksum: the same in both directions."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import xxhash

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.pacer import Pacer
from lightning_gemini.dataplane.slab import Buffer, BufferState
from lightning_gemini.dataplane.transport.paced_stream import PacedStream
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import IntegrityError, ProtocolError

IO_TIMEOUT_S = 20.0
SLOWEST_READ_BYTES_PER_S = 200e6
"""How fast, at the least, a peer reads its own memory again before it says that it has a version already."""
_POLL_S = 0.001


def send_chunks(
    sock: socket.socket,
    buffer: Buffer,
    version: VersionId,
    still_wanted: Callable[[], bool],
    pacer: Pacer | None = None,
    link: int = 0,
) -> bool:
    """Send every chunk as soon as it is sealed; false when the version is given up on the way.

    Args:
        sock: The connection.
        buffer: Holds the version, or is being filled with it.
        version: The version.
        still_wanted: Asked while there is nothing to send, or nothing may be sent.
        pacer: Says what may go; everything at once without it.
        link: The peer's machine rank, by which the pacer knows this connection.

    Raises:
        TornChunkError: It was given up in the middle of a chunk.
        OSError: The connection broke.
    """

    def wanted() -> bool:
        return buffer.id == version and still_wanted()

    def ready_bytes() -> int:
        return min(buffer.chunks_ready * buffer.chunk_bytes, buffer.data_bytes)

    paced = PacedStream(sock, pacer, link, wanted) if pacer is not None else None
    for index in range(buffer.chunks):
        while buffer.chunks_ready <= index or buffer.id != version:
            if not wanted():
                return False
            time.sleep(_POLL_S)
        chunk = buffer.chunk(index)
        frame = Frame(Kind.CHUNK, buffer.owner, version, index, 0, len(chunk), buffer.checksum(index))
        if paced is None:
            wire.send(sock, frame, chunk)
        elif not paced.send(frame, chunk, ready_bytes):
            return False
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
            require_wanted(buffer, begin.id)
            index = buffer.chunks_ready
            if (frame.owner, frame.id, frame.size) != (begin.owner, begin.id, index) or index >= buffer.chunks:
                raise ProtocolError(f"chunk {frame.size} of rank {frame.owner} came out of turn")
            target = buffer.chunk(index)
            if frame.length != len(target):
                raise ProtocolError(f"chunk {index} has {frame.length} bytes, expected {len(target)}")
            wire.receive_into(sock, target)
            seal_verified(buffer, index, frame.checksum)
        if (frame.owner, frame.id) != (begin.owner, begin.id):
            raise ProtocolError(f"a {frame.kind.name} frame of rank {frame.owner} came out of turn")
        if frame.kind is Kind.END:
            require_wanted(buffer, begin.id)
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


def seal_verified(buffer: Buffer, index: int, checksum: int) -> None:
    """Chunk ``index`` has arrived: let readers have it if it is what its sender sealed.

    Raises:
        IntegrityError: It is not.
    """
    if xxhash.xxh3_64_intdigest(buffer.chunk(index)) != checksum:
        raise IntegrityError(f"chunk {index} of rank {buffer.owner}'s shard was corrupted on the way")
    buffer.seal_chunk(index, checksum)


def require_wanted(buffer: Buffer, version: VersionId) -> None:
    """Raises ConnectionAbortedError where the version that is arriving was given up here meanwhile."""
    if buffer.id != version:  # a recovery went back behind it; the peer is not to blame
        raise ConnectionAbortedError(f"version {version.version} of rank {buffer.owner} was given up here meanwhile")
