"""The ways to send a version to its holders (GEMINI, SOSP '23, section 7.4, and one more)."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Scheme(str, enum.Enum):
    """When a version travels; see :attr:`~lightning_gemini.config.CheckpointConfig.schedule`."""

    INTERLEAVED = "interleaved"
    UNPIPELINED = "unpipelined"
    NAIVE = "naive"
    EAGER = "eager"
    BLOCKING = "blocking"
    NONE = "none"

    @property
    def paced(self) -> bool:
        """Whether it uses the network's idle spans alone, so that it needs a profile."""
        return self in (Scheme.INTERLEAVED, Scheme.UNPIPELINED, Scheme.NAIVE)


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a scheme cuts a shard.

    Attributes:
        chunk_bytes: Largest chunk (R/p).
        sub_buffers: Chunks in flight (p).
        one_chunk: Whether a span carries one chunk alone.
    """

    chunk_bytes: int
    sub_buffers: int
    one_chunk: bool = False

    @property
    def window_bytes(self) -> int:
        """Most bytes in flight (R)."""
        return self.chunk_bytes * self.sub_buffers


def chunking(scheme: Scheme, shard_bytes: int, buffer_bytes: int, sub_buffers: int) -> Chunking:
    """How ``scheme`` cuts a shard.

    Args:
        scheme: One that is paced.
        shard_bytes: Size of the shard.
        buffer_bytes: The buffer R of :attr:`Scheme.INTERLEAVED` and :attr:`Scheme.UNPIPELINED`;
            :attr:`Scheme.NAIVE` takes what it needs.
        sub_buffers: The number p of parts of :attr:`Scheme.INTERLEAVED`.

    Returns:
        Sizes for the schedule and for the pace.
    """
    if scheme is Scheme.NAIVE:
        return Chunking(max(shard_bytes, 1), 1, one_chunk=True)
    if scheme is Scheme.UNPIPELINED:
        return Chunking(buffer_bytes, 1)
    return Chunking(buffer_bytes // sub_buffers, sub_buffers)
