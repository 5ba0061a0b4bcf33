"""Shared memory that holds one rank's shard: a slab of two buffers, each with a version and per-chunk checksums.

A buffer is one ``memfd``: it has no name, travels between agent and worker as a file descriptor, and the kernel frees
it with the last process that maps it, so nothing can stay behind (see ``docs/decisions/0001-memfd.md``).

Layout of a buffer (all words little-endian u64)::

    0        header words (see ``_Word``)
    4096     one xxh3-64 checksum a chunk, 4096 slots
    65536    the shard's bytes

One process writes a buffer at a time: the worker for its own shard, the agent for a replica. Readers trust nothing but
checksums. These cover the version, its sizes, every chunk's checksum and every byte, but no word that changes while a
version is complete: what peers acknowledged, the owner's progress, and where the bytes came from.
"""

from __future__ import annotations

import enum
import mmap
import os
from collections.abc import Iterator

import xxhash

from lightning_gemini.core.consistency import BufferView
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.capacity import require_free
from lightning_gemini.errors import CapacityError, IntegrityError

HEADER_BYTES = 64 * 1024
CHUNK_SLOTS = 4096
MIN_CHUNK_BYTES = 1 << 20
_TABLE_OFFSET = 4096
_MAGIC = 0x31424D454754474C  # "LGTGEMB1"


class BufferState(enum.IntEnum):
    """What a buffer holds."""

    EMPTY = 0
    WRITING = 1
    COMPLETE = 2


class _Word(enum.IntEnum):
    MAGIC = 0
    OWNER = 1
    STATE = 2
    GENERATION = 3
    VERSION = 4
    DATA_BYTES = 5
    CHUNK_BYTES = 6
    CHUNKS_READY = 7
    HEADER_CHECKSUM = 8
    ACKED_GENERATION = 9
    ACKED_VERSION = 10
    RETRIEVED = 11
    PROGRESS = 12


_NEVER = 2**64 - 1


def chunk_bytes_for(data_bytes: int) -> int:
    """Chunk size for a shard: at least 1 MiB, and few enough chunks for the checksum table."""
    per_slot = -(-data_bytes // CHUNK_SLOTS)
    return max(MIN_CHUNK_BYTES, -(-per_slot // 65536) * 65536)


class Buffer:
    """One version of one shard in shared memory.

    Args:
        fd: A ``memfd`` made by :meth:`create`; owned by this object afterwards.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map()

    @classmethod
    def create(cls, owner: int, data_bytes: int) -> Buffer:
        """A new, empty, pre-faulted buffer for ``data_bytes`` of the shard of global rank ``owner``.

        Raises:
            CapacityError: The machine has not enough memory.
        """
        fd = os.memfd_create(f"lightning-gemini-{owner}", os.MFD_CLOEXEC)
        try:
            _allocate(fd, HEADER_BYTES + data_bytes)
            buffer = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        buffer._words[_Word.MAGIC] = _MAGIC
        buffer._words[_Word.OWNER] = owner
        buffer._words[_Word.ACKED_VERSION] = _NEVER
        return buffer

    def _map(self) -> None:
        size = os.fstat(self.fd).st_size
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._mapping = mmap.mmap(self.fd, size, flags=flags)
        view = memoryview(self._mapping)
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
        return self._words[_Word.OWNER]

    @property
    def state(self) -> BufferState:
        """Whether the buffer is empty, being written, or complete; a damaged word counts as empty."""
        state = self._words[_Word.STATE]
        return BufferState(state) if state in BufferState._value2member_map_ else BufferState.EMPTY

    @property
    def id(self) -> VersionId | None:
        """The version in the buffer, complete or not; ``None`` when empty."""
        if self.state is BufferState.EMPTY:
            return None
        return VersionId(self._words[_Word.GENERATION], self._words[_Word.VERSION])

    @property
    def view(self) -> BufferView:
        """The buffer as the consistency rules see it."""
        return BufferView(id=self.id, complete=self.state is BufferState.COMPLETE)

    @property
    def data_bytes(self) -> int:
        """Bytes of the shard in the buffer."""
        return self._words[_Word.DATA_BYTES]

    @property
    def chunk_bytes(self) -> int:
        """Bytes a chunk; the last one may be shorter."""
        return self._words[_Word.CHUNK_BYTES]

    @property
    def chunks(self) -> int:
        """Number of chunks of the shard."""
        return -(-self.data_bytes // self.chunk_bytes) if self.chunk_bytes else 0

    @property
    def chunks_ready(self) -> int:
        """Chunks, from the first on, that are written and sealed."""
        return self._words[_Word.CHUNKS_READY]

    @property
    def retrieved(self) -> bool:
        """Whether the bytes came from a peer rather than from the owner's own snapshot."""
        return bool(self._words[_Word.RETRIEVED])

    @property
    def acked(self) -> VersionId | None:
        """The newest version that every other holder was seen to hold completely (written by the agent)."""
        version = self._words[_Word.ACKED_VERSION]
        return None if version == _NEVER else VersionId(self._words[_Word.ACKED_GENERATION], version)

    @property
    def progress(self) -> int:
        """Optimizer steps that the owner completed, as it last said."""
        return self._words[_Word.PROGRESS]

    def chunk(self, index: int) -> memoryview:
        """The bytes of one chunk."""
        if not self.fits(self.data_bytes):
            self.remap()
        start = index * self.chunk_bytes
        return self.data[start : min(start + self.chunk_bytes, self.data_bytes)]

    def checksum(self, index: int) -> int:
        """The stored checksum of one chunk."""
        return self._table[index]

    def fits(self, data_bytes: int) -> bool:
        """Whether this process's mapping covers that many bytes."""
        return len(self.data) >= data_bytes

    def verify(self) -> None:
        """Check every byte.

        Raises:
            IntegrityError: The buffer is not complete, or its header or a chunk does not match its checksum.
        """
        if self.state is not BufferState.COMPLETE:
            raise IntegrityError(f"shard of rank {self.owner}: expected a complete buffer, found {self.state.name}")
        if (self._words[_Word.MAGIC], self._words[_Word.HEADER_CHECKSUM]) != (_MAGIC, self._header_checksum()):
            raise IntegrityError(f"shard of rank {self.owner}, version {self.id}: the header is corrupt")
        for index in range(self.chunks):
            if xxhash.xxh3_64_intdigest(self.chunk(index)) != self.checksum(index):
                raise IntegrityError(f"shard of rank {self.owner}, version {self.id}: chunk {index} is corrupt")

    # -- writing ---------------------------------------------------------------------------------------------------

    def begin(self, version: VersionId, data_bytes: int, *, retrieved: bool = False) -> None:
        """Start writing a version; what the buffer held is gone. Grows the memory where the shard has grown."""
        words = self._words
        words[_Word.STATE] = BufferState.EMPTY
        if not self.fits(data_bytes):
            if os.fstat(self.fd).st_size < HEADER_BYTES + data_bytes:
                _allocate(self.fd, HEADER_BYTES + data_bytes + data_bytes // 8)
            self.remap()
            words = self._words
        words[_Word.CHUNKS_READY] = 0
        words[_Word.GENERATION] = version.generation
        words[_Word.VERSION] = version.version
        words[_Word.DATA_BYTES] = data_bytes
        words[_Word.CHUNK_BYTES] = chunk_bytes_for(data_bytes)
        words[_Word.RETRIEVED] = int(retrieved)
        words[_Word.STATE] = BufferState.WRITING

    def seal(self, end_byte: int) -> None:
        """All bytes before ``end_byte`` are written: checksum the chunks that this fills and let readers have them."""
        while (index := self.chunks_ready) < self.chunks:
            if min((index + 1) * self.chunk_bytes, self.data_bytes) > end_byte:
                return
            self.seal_chunk(index, xxhash.xxh3_64_intdigest(self.chunk(index)))

    def seal_chunk(self, index: int, checksum: int) -> None:
        """Chunk ``index`` is written and has this checksum; chunks are sealed in order."""
        self._table[index] = checksum
        self._words[_Word.CHUNKS_READY] = index + 1

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
        self._words[_Word.HEADER_CHECKSUM] = self._header_checksum()
        self._words[_Word.STATE] = BufferState.COMPLETE

    def drop(self) -> None:
        """Forget what the buffer holds."""
        self._words[_Word.STATE] = BufferState.EMPTY

    def acknowledge(self, version: VersionId) -> None:
        """Every other holder holds ``version`` completely. Called by the agent only."""
        self._words[_Word.ACKED_VERSION] = _NEVER
        self._words[_Word.ACKED_GENERATION] = version.generation
        self._words[_Word.ACKED_VERSION] = version.version

    def forget_peers(self) -> None:
        """The other holders may be new machines: nothing is known of what they hold. Called by the agent only."""
        self._words[_Word.ACKED_VERSION] = _NEVER

    def forget_origin(self) -> None:
        """The recovery that brought these bytes here is over."""
        self._words[_Word.RETRIEVED] = 0

    def report_progress(self, step: int) -> None:
        """The owner completed ``step`` optimizer steps."""
        self._words[_Word.PROGRESS] = step

    def remap(self) -> None:
        """Map the memory anew after another process has grown it."""
        self._map()

    def _header_checksum(self) -> int:
        fields = self._words[_Word.OWNER : _Word.CHUNKS_READY + 1].tolist()
        fields[_Word.STATE - _Word.OWNER] = 0
        digest = xxhash.xxh3_64()
        digest.update(repr(fields).encode())
        digest.update(self._table[: self.chunks].tobytes())
        return digest.intdigest()


class Slab:
    """The two buffers of one rank's shard on one machine."""

    def __init__(self, first: Buffer, second: Buffer) -> None:
        self.buffers = (first, second)

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

    def complete(self) -> Iterator[Buffer]:
        """The complete buffers, newest version first."""
        found = [buffer for buffer in self.buffers if buffer.state is BufferState.COMPLETE]
        yield from sorted(found, key=lambda buffer: buffer.id or VersionId(0, 0), reverse=True)

    def holding(self, version: VersionId) -> Buffer | None:
        """The complete buffer with exactly this version, if any."""
        return next((buffer for buffer in self.complete() if buffer.id == version), None)

    def newest_started(self) -> Buffer | None:
        """The buffer with the newest version, complete or still being written."""
        started = [(buffer.id, buffer) for buffer in self.buffers if buffer.id is not None]
        return max(started, key=lambda pair: pair[0])[1] if started else None

    def close(self) -> None:
        """Drop this process's hold on the memory."""
        for buffer in self.buffers:
            buffer.close()


def _allocate(fd: int, size: int) -> None:
    require_free(size - os.fstat(fd).st_size)  # the kernel would kill a process rather than refuse
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise CapacityError(
            f"cannot allocate {size / 2**20:.0f} MiB of shared memory ({error.strerror}); "
            "use fewer replicas, more machines, or machines with more memory"
        ) from error
