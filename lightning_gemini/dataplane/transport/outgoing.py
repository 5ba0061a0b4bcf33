"""A version on its way out of a slab, piece by piece."""

from __future__ import annotations

import struct
import time
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.pacer import Underway
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.wire import MAX_CHUNK_BYTES, Frame

# Longer than a writer takes from one chunk to the next, but for one that waits for the network.
_GROWING_S, _GROWING_BYTES_PER_S = 0.005, 2e9


def chunks_ended(buffer: Buffer, end_byte: int) -> int:
    """The number of the shard's chunks that lie before ``end_byte``."""
    return buffer.chunks if end_byte == buffer.data_bytes else end_byte // buffer.chunk_bytes


def checksum_table(buffer: Buffer, begin_byte: int, end_byte: int) -> bytes:
    """The checksums of the chunks that end within a piece."""
    ended = range(chunks_ended(buffer, begin_byte), chunks_ended(buffer, end_byte))
    return struct.pack(f"<{len(ended)}Q", *(buffer.checksum(index) for index in ended))


@dataclass(slots=True)
class Outgoing:
    """A version on its way.

    Attributes:
        begin: What announced it.
        piece_bytes: Size of a sub-buffer; 0: pieces of any size.
        offset: Bytes sent.
        uncredited: Pieces that the holder has not copied out yet: bytes, and their sending.
    """

    buffer: Buffer
    begin: Frame
    sub_buffers: int
    piece_bytes: int
    source: torch.Tensor
    offset: int = 0
    pieces: int = 0
    ready: int = 0
    grew: float = 0.0
    heard: float = field(default_factory=time.monotonic)
    uncredited: deque[tuple[int, dist.Work]] = field(default_factory=deque)

    @property
    def version(self) -> VersionId:
        """Which one."""
        return self.begin.id

    @property
    def data_bytes(self) -> int:
        """Its size."""
        return self.begin.size

    @property
    def in_flight(self) -> int:
        """Bytes that the holder has not copied out yet."""
        return sum(size for size, _ in self.uncredited)

    @property
    def underway(self) -> Underway:
        """The same as a pacer wants to know it: nobody says which of them the link has carried."""
        return Underway(self.in_flight, self.in_flight)

    def sendable(self) -> int:
        """Bytes that the writer has sealed and a sub-buffer can take."""
        if len(self.uncredited) >= self.sub_buffers:
            return 0
        ready = min(self.buffer.chunks_ready * self.buffer.chunk_bytes, self.data_bytes)
        if self.piece_bytes:
            return min(ready - self.offset, self.piece_bytes)
        if ready != self.ready:
            self.ready, self.grew = ready, time.monotonic()
        patience_s = _GROWING_S + self.buffer.chunk_bytes / _GROWING_BYTES_PER_S
        growing = ready < self.data_bytes and time.monotonic() - self.grew < patience_s
        return 0 if growing else min(ready - self.offset, MAX_CHUNK_BYTES)  # the one piece of a span is to be large
