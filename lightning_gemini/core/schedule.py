"""Which bytes of a checkpoint travel in which idle span (GEMINI, SOSP '23, Algorithm 2, three misprints corrected).

Every machine sends the m - 1 remote copies of its checkpoint, one after the other, cut into chunks. A chunk of s bytes
keeps the network busy for f(s) = startup + s / bandwidth, and is no larger than one sub-buffer of the receiver. A span
is filled up to a safe part of its mean length, as the length varies from iteration to iteration.

Corrected against the paper: a span in which no byte fits ends (the printed loop never does); what a chunk takes from
its span is f of its own size, not of the bytes that remain; and m - 1 copies are scheduled, not m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gemini.errors import ConfigurationError

__all__ = ["MAX_CHUNKS", "Chunk", "Packing", "Schedule", "check_spans", "schedule_chunks"]

MAX_CHUNKS = 1_000_000
"""More chunks than any sensible buffer makes: 1.2 TB in chunks of 32 MB are 37,500."""

_ROUNDING = 1e-12
"""Part by which a span is taken longer, so that what fits exactly also fits in floating point."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes that travel in one piece.

    Attributes:
        copy: Which remote copy they belong to, from 0; replicas - 1 copies are sent.
        offset_bytes: Where they start in the checkpoint.
        size_bytes: How many they are, at least 1.
    """

    copy: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every chunk of a checkpoint, in the order of sending.

    Attributes:
        spans: ``spans[i]`` are the chunks of idle span i. The last span also takes all that fits into none.
        overrun_s: How much longer than its usable length the last span is busy, which lengthens the iteration; 0.0 if
            and only if everything fits.
    """

    spans: tuple[tuple[Chunk, ...], ...]
    overrun_s: float


def schedule_chunks(
    idle_spans_s: Sequence[float],
    checkpoint_bytes: int,
    *,
    replicas: int,
    bandwidth_bytes_per_s: float,
    startup_s: float,
    buffer_bytes: int,
    sub_buffers: int,
    safety: float,
) -> Schedule:
    """Spreads the remote copies of one checkpoint over idle spans (GEMINI, SOSP '23, Algorithm 2).

    Nothing is ever dropped: what the spans cannot take goes at the end of the last one.

    Args:
        idle_spans_s: Mean length of every idle span, in the order of time; at least one.
        checkpoint_bytes: Bytes of one copy (C).
        replicas: Copies of every shard, the owner's own, which does not travel, included (m).
        bandwidth_bytes_per_s: Speed of the link (B).
        startup_s: Time that every chunk takes beyond its bytes (alpha).
        buffer_bytes: What the receiver reserves (R).
        sub_buffers: Parts of that reserve; one receives while another is copied out (p). A chunk has R / p bytes or
            less.
        safety: Part of a span that is used, in (0, 1]; it covers the spread of the spans (mu).

    Raises:
        ConfigurationError: A number is impossible, or the chunks are so small that there would be more than
            `MAX_CHUNKS`.
    """
    check_spans(idle_spans_s)
    packing = Packing(
        checkpoint_bytes,
        replicas=replicas,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        startup_s=startup_s,
        buffer_bytes=buffer_bytes,
        sub_buffers=sub_buffers,
        safety=safety,
    )
    spans = [packing.fill(span_s) for span_s in idle_spans_s[:-1]]
    overrun_s = packing.overrun_s(idle_spans_s[-1])
    return Schedule((*spans, packing.rest()), overrun_s)


class Packing:
    """Cuts the remote copies of one checkpoint into chunks, span by span.

    Arguments and errors are those of `schedule_chunks`.
    """

    def __init__(
        self,
        checkpoint_bytes: int,
        *,
        replicas: int,
        bandwidth_bytes_per_s: float,
        startup_s: float,
        buffer_bytes: int,
        sub_buffers: int,
        safety: float,
    ) -> None:
        _check_checkpoint(checkpoint_bytes, replicas)
        _check_link(bandwidth_bytes_per_s, startup_s)
        _check_buffer(buffer_bytes, sub_buffers, safety)
        self._largest_bytes = buffer_bytes // sub_buffers
        _check_chunks(checkpoint_bytes, replicas - 1, self._largest_bytes)
        self._checkpoint_bytes = checkpoint_bytes
        self._copies = replicas - 1 if checkpoint_bytes else 0
        self._bandwidth_bytes_per_s, self._startup_s = bandwidth_bytes_per_s, startup_s
        self._used_part = safety * (1 + _ROUNDING)
        self._copy = self._offset = 0

    def holds(self, span_s: float) -> bool:
        """Whether a span of that length carries a single byte."""
        return self._fitting_bytes(self._used_part * span_s) > 0

    def fill(self, span_s: float) -> tuple[Chunk, ...]:
        """Takes what the usable part of a span of that length carries."""
        chunks = []
        usable_s = self._used_part * span_s
        while chunk := self._take(self._fitting_bytes(usable_s)):
            chunks.append(chunk)
            usable_s -= self._busy_s(1, chunk.size_bytes)
        return tuple(chunks)

    def overrun_s(self, span_s: float) -> float:
        """How much longer than the usable part of a span of that length all that is left would take."""
        copies = self._copies - self._copy
        left_bytes = copies * self._checkpoint_bytes - self._offset
        chunks = -(-(self._checkpoint_bytes - self._offset) // self._largest_bytes)
        chunks += (copies - 1) * -(-self._checkpoint_bytes // self._largest_bytes)
        return max(0.0, self._busy_s(chunks, left_bytes) - self._used_part * span_s)

    def rest(self) -> tuple[Chunk, ...]:
        """Takes all that is left, as if the span never ended."""
        return tuple(iter(lambda: self._take(self._largest_bytes), None))

    def _take(self, most_bytes: int) -> Chunk | None:
        size = min(most_bytes, self._checkpoint_bytes - self._offset)
        if self._copy == self._copies or size <= 0:
            return None
        chunk = Chunk(self._copy, self._offset, size)
        self._offset += size
        if self._offset == self._checkpoint_bytes:
            self._copy, self._offset = self._copy + 1, 0
        return chunk

    def _busy_s(self, chunks: int, size_bytes: int) -> float:
        return chunks * self._startup_s + size_bytes / self._bandwidth_bytes_per_s

    def _fitting_bytes(self, usable_s: float) -> int:
        """The largest chunk that fits into that time; 0 if none does."""
        if usable_s >= self._busy_s(1, self._largest_bytes):
            return self._largest_bytes
        if not usable_s > self._startup_s:
            return 0
        return min(self._largest_bytes, math.floor((usable_s - self._startup_s) * self._bandwidth_bytes_per_s))


def check_spans(idle_spans_s: Sequence[float]) -> None:
    """Refuses what cannot be the idle spans of an iteration.

    Raises:
        ConfigurationError: There is none, or a length is negative or no number.
    """
    if not idle_spans_s:
        raise ConfigurationError(
            "a schedule needs at least 1 idle span, got none: "
            "an iteration without communication is one span as long as itself"
        )
    for index, span_s in enumerate(idle_spans_s):
        if not (math.isfinite(span_s) and span_s >= 0):
            raise ConfigurationError(
                f"idle spans must be finite and not negative, span {index} is {span_s} s: profile the iteration again"
            )


def _check_checkpoint(checkpoint_bytes: int, replicas: int) -> None:
    if checkpoint_bytes < 0:
        raise ConfigurationError(f"checkpoint_bytes must be 0 or more, got {checkpoint_bytes}: give bytes of one copy")
    if replicas < 1:
        raise ConfigurationError(
            f"replicas must be 1 or more (the owner's own copy counts), got {replicas}: use 1 to send no copy at all"
        )


def _check_link(bandwidth_bytes_per_s: float, startup_s: float) -> None:
    if not (math.isfinite(bandwidth_bytes_per_s) and bandwidth_bytes_per_s > 0):
        raise ConfigurationError(
            f"bandwidth_bytes_per_s must be finite and above 0, got {bandwidth_bytes_per_s}: measure the link again"
        )
    if not (math.isfinite(startup_s) and startup_s >= 0):
        raise ConfigurationError(
            f"startup_s must be finite and not negative, got {startup_s}: measure the link again, or use 0"
        )


def _check_buffer(buffer_bytes: int, sub_buffers: int, safety: float) -> None:
    if sub_buffers < 1:
        raise ConfigurationError(f"sub_buffers must be 1 or more, got {sub_buffers}: use 1 for no pipeline, or 4")
    if buffer_bytes < sub_buffers:
        raise ConfigurationError(
            f"buffer_bytes must be at least 1 byte for each of the {sub_buffers} sub-buffers, got {buffer_bytes}: "
            "use a larger buffer or fewer sub-buffers"
        )
    if not 0 < safety <= 1:
        raise ConfigurationError(
            f"safety must be above 0 and at most 1, got {safety}: use 0.8 where idle spans vary, 1 where they do not"
        )


def _check_chunks(checkpoint_bytes: int, copies: int, largest_bytes: int) -> None:
    chunks = copies * -(-checkpoint_bytes // largest_bytes)
    if chunks > MAX_CHUNKS:
        enough = -(-checkpoint_bytes * copies // MAX_CHUNKS)
        raise ConfigurationError(
            f"{copies} copies of {checkpoint_bytes} bytes in chunks of {largest_bytes} bytes (buffer_bytes / "
            f"sub_buffers) would be {chunks} chunks, at most {MAX_CHUNKS} are scheduled: "
            f"use a larger buffer or fewer sub-buffers, so that a chunk has {2 * enough} bytes or more"
        )
