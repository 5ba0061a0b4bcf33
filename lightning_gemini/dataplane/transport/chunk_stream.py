"""A shard on a socket, chunk by chunk, each with its checksum: the same in both directions."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import xxhash

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.slab import Buffer, BufferState
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import IntegrityError, ProtocolError

IO_TIMEOUT_S = 20.0
SLOWEST_READ_BYTES_PER_S = 200e6
"""How fast, at the least, a peer reads its own memory again before it says that it has a version already."""
_POLL_S = 0.001


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
            _require_wanted(buffer, begin.id)
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
        if (frame.owner, frame.id) != (begin.owner, begin.id):
            raise ProtocolError(f"a {frame.kind.name} frame of rank {frame.owner} came out of turn")
        if frame.kind is Kind.END:
            _require_wanted(buffer, begin.id)
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


def _require_wanted(buffer: Buffer, version: VersionId) -> None:
    if buffer.id != version:  # a recovery went back behind it; the peer is not to blame
        raise ConnectionAbortedError(f"version {version.version} of rank {buffer.owner} was given up here meanwhile")
