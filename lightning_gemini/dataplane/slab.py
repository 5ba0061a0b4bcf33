"""Shared memory that holds one rank's shard: a slab of two buffers, each with a version and per-chunk checksums.

A buffer is one ``memfd``: it has no name, travels between agent and worker as a file descriptor, and the kernel frees
it with the last process that maps it, so nothing can stay behind (see ``docs/decisions/0001-memfd.md``).

Layout of a buffer (all words little-endian u64)::

    0        header words (see :mod:`~lightning_gemini.dataplane.header`)
    4096     one xxh3-64 checksum a chunk, 4096 slots
    36864    in a slab's first buffer: the owner's :mod:`~lightning_gemini.dataplane.pace_page`
    98304    the shard's bytes

One process writes a buffer at a time: the worker for its own shard, the agent for a replica. Readers trust nothing but
checksums.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import xxhash

from lightning_gemini.core.consistency import BufferView
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import header, resident_memory
from lightning_gemini.dataplane.header import CHUNK_SLOTS, BufferState, Record, Word
from lightning_gemini.dataplane.pace_page import PacePage
from lightning_gemini.errors import IntegrityError

__all__ = ["CHUNK_SLOTS", "HEADER_BYTES", "Buffer", "BufferState", "Slab", "chunk_bytes_for"]

HEADER_BYTES = 96 * 1024
MIN_CHUNK_BYTES = 1 << 20
_FEW_CHUNKS, _LARGE_CHUNK_BYTES = 128, 64 << 20  # between two checksums a thread of a worker is in training's way
_TABLE_OFFSET = 4096
_PACE_OFFSET = _TABLE_OFFSET + 8 * CHUNK_SLOTS
_ACKED = Record(Word.ACKED, 2)
_COMMITTED = Record(Word.COMMITTED, 2)
_PROGRESS = Record(Word.PROGRESS, 1), Record(Word.PROGRESS_AGAIN, 1)


def chunk_bytes_for(data_bytes: int) -> int:
    """Chunk size for a shard: at least 1 MiB, large enough for few chunks, and for the checksum table."""
    few, fitting = -(-data_bytes // _FEW_CHUNKS), -(-data_bytes // CHUNK_SLOTS)
    return max(MIN_CHUNK_BYTES, -(-max(fitting, min(few, _LARGE_CHUNK_BYTES)) // 65536) * 65536)


class Buffer:
    """One version of one shard in shared memory.

    Args:
        fd: A ``memfd`` made by :meth:`create`; owned by this object afterwards.
        mapping: Its memory, if it is mapped already.
    """

    def __init__(self, fd: int, mapping: mmap.mmap | None = None) -> None:
        self.fd = fd
        self._use(mapping or resident_memory.map_whole(fd))

    @classmethod
    def create(cls, owner: int, data_bytes: int) -> Buffer:
        """A new, empty, pre-faulted buffer for ``data_bytes`` of the shard of global rank ``owner``.

        Raises:
            CapacityError: The machine has not enough memory.
        """
        buffer = cls(*resident_memory.create(f"lightning-gemini-{owner}", HEADER_BYTES + data_bytes))
        buffer._words[Word.MAGIC] = header.MAGIC
        header.write_owner(buffer._words, owner)
        return buffer

    def _use(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        view = memoryview(mapping)
        self._words = view[:_TABLE_OFFSET].cast("Q")
        self._table = view[_TABLE_OFFSET : _TABLE_OFFSET + 8 * CHUNK_SLOTS].cast("Q")
        self.data = view[HEADER_BYTES:]

    def close(self) -> None:
        """Drop this process's hold on the memory; it is freed with the last holder."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            # Tensors may still look into the mapping; it goes with the last of them.
            self._table = self.data = memoryview(b"")
            self._words = memoryview(bytearray(_TABLE_OFFSET)).cast("Q")  # other threads find an empty buffer
            del self._mapping

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def owner(self) -> int:
        """Global rank whose shard this is."""
        return header.owner(self._words)

    @property
    def state(self) -> BufferState:
        """Whether the buffer is empty, being written, or complete; with a damaged header it counts as empty."""
        return header.contents(self._words, self._table).state

    @property
    def id(self) -> VersionId | None:
        """The version in the buffer, complete or not; ``None`` when empty."""
        return header.contents(self._words, self._table).id

    @property
    def view(self) -> BufferView:
        """The buffer as the consistency rules see it."""
        found = header.contents(self._words, self._table)
        return BufferView(id=found.id, complete=found.state is BufferState.COMPLETE)

    @property
    def data_bytes(self) -> int:
        """Bytes of the shard in the buffer."""
        return self._words[Word.DATA_BYTES]

    @property
    def chunk_bytes(self) -> int:
        """Bytes a chunk; the last one may be shorter."""
        return self._words[Word.CHUNK_BYTES]

    @property
    def chunks(self) -> int:
        """Number of chunks of the shard."""
        return -(-self.data_bytes // self.chunk_bytes) if self.chunk_bytes else 0

    @property
    def chunks_ready(self) -> int:
        """Chunks, from the first on, that are written and sealed."""
        return self._words[Word.CHUNKS_READY]

    @property
    def retrieved(self) -> bool:
        """Whether the bytes came from a peer rather than from the owner's own snapshot."""
        return header.fact(self._words, Word.RETRIEVED)

    @property
    def acked(self) -> VersionId | None:
        """The newest version that every other holder was seen to hold completely (written by the agent)."""
        found = _ACKED.read(self._words)
        return VersionId(*found) if found else None

    @property
    def acked_at_ns(self) -> int:
        """When that was seen, on the monotonic clock; for statistics alone, nothing covers this word."""
        return self._words[Word.ACKED_AT]

    @property
    def committed(self) -> VersionId | None:
        """The newest version that the owner knows to be complete on all holders of all ranks, whatever is in here."""
        found = _COMMITTED.read(self._words)
        return VersionId(*found) if found else None

    @property
    def progress(self) -> int:
        """Optimizer steps that the owner completed, as it last said."""
        found = _PROGRESS[0].read(self._words) or _PROGRESS[1].read(self._words)
        return found[0] if found else 0

    def chunk(self, index: int) -> memoryview:
        """The bytes of one chunk."""
        if not self.fits(self.data_bytes):
            self.remap()
        start = index * self.chunk_bytes
        return self.data[start : min(start + self.chunk_bytes, self.data_bytes)]

    def checksum(self, index: int) -> int:
        """The stored checksum of one chunk."""
        return self._table[index]

    def pace_page(self) -> PacePage:
        """The page in which the owner says when its bytes may travel; it stays valid when the buffer grows."""
        if self.fd < 0:
            return PacePage.private()
        return PacePage(memoryview(self._mapping)[_PACE_OFFSET:HEADER_BYTES].cast("Q"))

    def fits(self, data_bytes: int) -> bool:
        """Whether this process's mapping covers that many bytes."""
        return len(self.data) >= data_bytes

    def verify(self) -> None:
        """Check every byte.

        Raises:
            IntegrityError: The buffer is not complete, or its header or a chunk does not match its checksum.
        """
        if self.state is not BufferState.COMPLETE:
            raise IntegrityError(f"shard of rank {self.owner}: {self._why_incomplete()}")
        for index in range(self.chunks):
            if self.hashed(index) != self.checksum(index):
                raise IntegrityError(f"shard of rank {self.owner}, version {self.id}: chunk {index} is corrupt")

    def _why_incomplete(self) -> str:
        if self._words[Word.STATE] == BufferState.COMPLETE:
            return "the header is corrupt"
        return f"expected a complete buffer, found {self.state.name}"

    # -- writing ---------------------------------------------------------------------------------------------------

    def begin(self, version: VersionId, data_bytes: int, *, retrieved: bool = False) -> None:
        """Start writing a version; what the buffer held is gone. Grows the memory where the shard has grown."""
        self.drop()
        if not self.fits(data_bytes):
            if os.fstat(self.fd).st_size < HEADER_BYTES + data_bytes:
                self._use(resident_memory.grow(self.fd, HEADER_BYTES + data_bytes + data_bytes // 8))
            else:
                self.remap()
        words = self._words
        words[Word.CHUNKS_READY] = 0
        header.write_identity(words, version, data_bytes, chunk_bytes_for(data_bytes))
        header.write_fact(words, Word.RETRIEVED, retrieved)
        # Those of the version before would fit its bytes, which are still here.
        self._table[: self.chunks] = memoryview(bytes(8 * self.chunks)).cast("Q")
        words[Word.STATE] = BufferState.WRITING

    def seal(self, end_byte: int) -> None:
        """All bytes before ``end_byte`` are written: checksum the chunks that this fills and let readers have them."""
        while (index := self.chunks_ready) < self.chunks:
            if min((index + 1) * self.chunk_bytes, self.data_bytes) > end_byte:
                return
            self.seal_chunk(index, self.hashed(index))

    def hashed(self, index: int) -> int:
        """The checksum that chunk ``index`` should have; on several threads at once where bytes come that fast."""
        return xxhash.xxh3_64_intdigest(self.chunk(index))

    def seal_chunk(self, index: int, checksum: int) -> None:
        """Chunk ``index`` is written and has this checksum; chunks are sealed in order."""
        self._table[index] = checksum
        self._words[Word.CHUNKS_READY] = index + 1

    def complete(self) -> None:
        """Every chunk is sealed: from now on the version counts.

        Raises:
            IntegrityError: A chunk is missing, or the version was dropped while it was being written.
        """
        if self.state is not BufferState.WRITING:
            raise IntegrityError(f"shard of rank {self.owner}: the version was given up while it was being written")
        if self.chunks_ready != self.chunks:
            raise IntegrityError(
                f"shard of rank {self.owner}, version {self.id}: {self.chunks_ready} of {self.chunks} chunks written"
            )
        words = self._words
        sealed = self._table[: self.chunks]
        checksum = header.whole_checksum(words[Word.IDENTITY_CHECKSUM], words[Word.CHUNKS_READY], sealed)
        words[Word.HEADER_CHECKSUM] = checksum
        words[Word.STATE] = BufferState.COMPLETE

    def drop(self) -> None:
        """Forget what the buffer holds."""
        self._words[Word.STATE] = BufferState.EMPTY
        self._words[Word.HEADER_CHECKSUM] = 0  # so that no damage can bring it back
        self._words[Word.IDENTITY_CHECKSUM] = 0

    def acknowledge(self, version: VersionId, at_ns: int = 0) -> None:
        """Every other holder holds ``version`` completely, since ``at_ns`` (monotonic). Called by the agent only."""
        self._words[Word.ACKED_AT] = at_ns
        _ACKED.write(self._words, version.generation, version.version)

    def forget_peers(self) -> None:
        """The other holders may be new machines: nothing is known of what they hold. Called by the agent only."""
        _ACKED.erase(self._words)

    def note_committed(self, version: VersionId) -> None:
        """``version`` is complete on all holders of all ranks. Called by the owner only."""
        _COMMITTED.write(self._words, version.generation, version.version)

    def forget_origin(self) -> None:
        """The recovery that brought these bytes here is over."""
        header.write_fact(self._words, Word.RETRIEVED, False)

    def report_progress(self, step: int) -> None:
        """The owner completed ``step`` optimizer steps."""
        for record in _PROGRESS:
            record.write(self._words, step)

    def remap(self) -> None:
        """Map the memory anew after another process has grown it."""
        self._use(resident_memory.map_whole(self.fd))


class Slab:
    """The two buffers of one rank's shard on one machine."""

    def __init__(self, first: Buffer, second: Buffer) -> None:
        self.buffers = (first, second)
        self.pace = first.pace_page()
        """When the shard's bytes may travel to its holders."""

    @classmethod
    def create(cls, owner: int, data_bytes: int) -> Slab:
        """A new slab for shards of up to ``data_bytes`` each.

        Raises:
            CapacityError: The machine has not enough memory.
        """
        first = Buffer.create(owner, data_bytes)
        try:
            return cls(first, Buffer.create(owner, data_bytes))
        except BaseException:
            first.close()
            raise

    @property
    def owner(self) -> int:
        """Global rank whose shards these are."""
        return self.buffers[0].owner

    @property
    def views(self) -> tuple[BufferView, BufferView]:
        """Both buffers as the consistency rules see them."""
        return self.buffers[0].view, self.buffers[1].view

    @property
    def total_bytes(self) -> int:
        """Memory that the slab takes."""
        return sum(os.fstat(buffer.fd).st_size for buffer in self.buffers)

    @property
    def committed(self) -> VersionId | None:
        """The newest version that the owner knows to be committed; survives the owner's process."""
        return max((known for buffer in self.buffers if (known := buffer.committed) is not None), default=None)

    def note_committed(self, version: VersionId) -> None:
        """``version`` is complete on all holders of all ranks. Called by the owner only."""
        for buffer in self.buffers:
            buffer.note_committed(version)

    def kept_beside(self, version: VersionId) -> VersionId | None:
        """The version that the owner keeps while it writes this one: what it knows to be committed.

        Rather than what it has: its own copy may be damaged.
        """
        complete = (view.id for view in self.views if view.complete)
        known = [self.committed] if self.committed else complete
        return max((other for other in known if other is not None and other < version), default=None)

    def complete(self) -> Iterator[Buffer]:
        """The complete buffers, newest version first."""
        yield from (buffer for _, buffer in sorted(self._complete(), key=lambda pair: pair[0], reverse=True))

    def _complete(self) -> Iterator[tuple[VersionId, Buffer]]:
        for buffer in self.buffers:
            view = buffer.view  # once: the owner may begin the next version meanwhile
            if view.complete and view.id is not None:
                yield view.id, buffer

    def holding(self, version: VersionId) -> Buffer | None:
        """The complete buffer with exactly this version, if any."""
        return next((buffer for held, buffer in self._complete() if held == version), None)

    def newest_started(self) -> Buffer | None:
        """The buffer with the newest version, complete or still being written."""
        started = [(version, buffer) for buffer in self.buffers if (version := buffer.id) is not None]
        return max(started, key=lambda pair: pair[0])[1] if started else None

    def close(self) -> None:
        """Drop this process's hold on the memory."""
        self.pace.close()
        for buffer in self.buffers:
            buffer.close()
