"""Which of a slab's two buffers may be overwritten without ever losing the last common version.

Two buffers are not enough by themselves: a fast rank that writes step k+1 over k-1 while a slow peer has not finished k
leaves no common version if a failure hits then. So k-1 is reused only after k is known to be committed everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_gemini.core.recovery import VersionId

__all__ = [
    "BufferView",
    "ReplicaPlace",
    "newest_complete",
    "replica_place",
    "retrieval_place",
    "superseded",
    "writable_buffer",
]


@dataclass(frozen=True, slots=True)
class BufferView:
    """What one buffer of a slab holds.

    Attributes:
        id: The version in it, or being written to it; ``None`` where it was never used.
        complete: Whether all its bytes arrived and every checksum holds.
    """

    id: VersionId | None
    complete: bool


def newest_complete(buffers: Iterable[BufferView]) -> VersionId | None:
    """Returns the newest version that is complete in ``buffers``."""
    return max((buffer.id for buffer in buffers if buffer.id is not None and buffer.complete), default=None)


def writable_buffer(buffers: tuple[BufferView, BufferView], committed: VersionId | None) -> int | None:
    """Picks the buffer that the next version may overwrite.

    A complete version is protected when it is ``committed`` or newer. Newer ones too, because the commit may have
    happened without this machine having heard of it: peers may have given up their older version for it already.

    Whoever gets ``None`` skips its version. A version that some rank skips can never be committed; so ranks must skip
    together, else those who wrote it would protect it, and skip, for ever. Versions that all ranks agreed to give up,
    and those that a recovery left behind (see `superseded`), must first be invalidated by the caller.

    Args:
        buffers: The slab's two buffers.
        committed: The newest version known to be committed everywhere; ``None`` while none is known.

    Returns:
        0 or 1: an unused or torn buffer where there is one, else the one with the oldest version. ``None``: skip.
    """
    free = [index for index, buffer in enumerate(buffers) if not _protected(buffer, committed)]
    return min(free, key=lambda index: _age(buffers[index]), default=None)


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """Where a holder lets a replica go.

    Attributes:
        index: The buffer, 0 or 1; ``None``: the replica must be refused.
        given_up: Buffers whose versions all ranks gave up; they are to be invalidated first, whatever ``index`` is.
    """

    index: int | None
    given_up: tuple[int, ...] = ()


def replica_place(buffers: tuple[BufferView, BufferView], version: VersionId, kept: VersionId | None) -> ReplicaPlace:
    """Picks the buffer of a holder that an incoming replica may overwrite.

    A holder does not know what is committed. It keeps its newest complete version, and what lies between ``kept`` and
    the incoming one cannot be that: the owner would not have begun another version before it was committed or given up.
    Without that the common version would be overwritten and the one that was given up be kept.

    Nothing makes room for a version older than itself: that would be a message from long ago. Nor does ``kept``, for
    one that lies beside what a recovery is about to leave behind.

    Args:
        buffers: The replica's two buffers; none of them holds ``version`` completely.
        version: The incoming version.
        kept: The version that its owner knows to be committed, where that is older.
    """
    given_up = tuple(
        index
        for index, buffer in enumerate(buffers)
        if kept is not None and buffer.id is not None and kept < buffer.id < version
    )
    left = tuple(BufferView(None, False) if index in given_up else buffer for index, buffer in enumerate(buffers))
    index = writable_buffer((left[0], left[1]), newest_complete(left))
    overwritten = None if index is None else _held(left[index])
    if overwritten is not None and (overwritten > version or overwritten == kept):
        index = None
    return ReplicaPlace(index, given_up)


def retrieval_place(buffers: tuple[BufferView, BufferView], version: VersionId, *, own: bool) -> int | None:
    """Picks the buffer that a shard may overwrite which everybody is about to load.

    What is newer is worthless then, see `superseded`, and makes room before what is older: that is the version to fall
    back to as long as ``version`` is not on all its holders again.

    Args:
        buffers: The slab's two buffers.
        version: The version that everybody is about to load.
        own: Whether the shard is this machine's own, which its worker cannot do without. For a peer's replica nothing
            complete and older is overwritten: a holder does not know which of them was committed and which was given
            up. Its owner does, and sends it again.
    """
    worthless = superseded(buffers, version)
    left = tuple(BufferView(None, False) if index in worthless else buffer for index, buffer in enumerate(buffers))
    index = writable_buffer((left[0], left[1]), newest_complete(left))
    return index if own or index is None or _held(left[index]) is None else None


def superseded(buffers: Sequence[BufferView], loaded: VersionId | None) -> tuple[int, ...]:
    """Returns the buffers that are worthless once every rank goes on from version ``loaded``.

    What is newer than the version that memory could serve lacks somebody's shard for good, and would block its buffer.
    With ``None`` (memory could not serve at all) that is every buffer in use. Call it with the plan's version, also
    when the user's own checkpoint is loaded in its place: memory keeps that version until a newer one is committed.
    """
    return tuple(
        index
        for index, buffer in enumerate(buffers)
        if buffer.id is not None and (loaded is None or buffer.id > loaded)
    )


def _held(buffer: BufferView) -> VersionId | None:
    return buffer.id if buffer.complete else None


def _protected(buffer: BufferView, committed: VersionId | None) -> bool:
    if buffer.id is None or not buffer.complete:
        return False
    return committed is None or buffer.id >= committed


def _age(buffer: BufferView) -> tuple[bool, VersionId]:
    """Orders buffers by what is lost least: unused and torn ones first, then the older version."""
    if buffer.id is None or not buffer.complete:
        return (False, VersionId(0, 0))
    return (True, buffer.id)
