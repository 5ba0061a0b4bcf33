"""The words in front of a buffer's bytes, and how a reader tells sound ones from damaged or half-written ones.

Nothing in shared memory is believed because it is there: another process may be writing it, may have died while it did,
or memory itself may have lost a bit. So every word is covered: what a version is by a checksum of its identity from the
first moment on, the whole header and the table of chunk checksums by another once it is complete, what peers and
workers note by one each (`Record`), and single facts by repetition. One damaged byte anywhere is either noticed, or
changes nothing that anybody reads.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import xxhash

from lightning_gemini.core.recovery import VersionId

MAGIC = 0x32424D454754474C  # "LGTGEMB2"
CHUNK_SLOTS = 4096
_IDENTITY = struct.Struct("<5Q")
_WHOLE = struct.Struct("<2Q")
_ALL_ONES = 2**64 - 1


class BufferState(enum.IntEnum):
    """What a buffer holds; no byte of one is in the same place of another, so none turns into another by itself."""

    EMPTY = 0
    WRITING = int.from_bytes(b"WRITING.", "little")
    COMPLETE = int.from_bytes(b"COMPLETE", "little")


class Word(enum.IntEnum):
    """Place of each word in the header; records take several."""

    MAGIC = 0
    OWNER = 1
    STATE = 2
    GENERATION = 3
    VERSION = 4
    DATA_BYTES = 5
    CHUNK_BYTES = 6
    CHUNKS_READY = 7
    HEADER_CHECKSUM = 8
    IDENTITY_CHECKSUM = 9
    RETRIEVED = 10
    OWNER_AGAIN = 11
    OWNER_ONCE_MORE = 12
    ACKED = 13
    PROGRESS = 16
    PROGRESS_AGAIN = 18
    COMMITTED = 20
    ACKED_AT = 23
    END = 24


_IN_USE = {int(state): state for state in (BufferState.WRITING, BufferState.COMPLETE)}
_IN_ONE_READ = int(Word.IDENTITY_CHECKSUM) + 1
_OWNERS = int(Word.OWNER), int(Word.OWNER_AGAIN), int(Word.OWNER_ONCE_MORE)


@dataclass(frozen=True, slots=True)
class Record:
    """Words that change together, with their checksum behind them.

    Attributes:
        first: The first word.
        count: Number of words, without the checksum.
    """

    first: int
    count: int

    def read(self, words: memoryview) -> tuple[int, ...] | None:
        """Returns the values; ``None`` where nothing was written, or it is damaged, or being written."""
        *values, checksum = words[self.first : self.first + self.count + 1].tolist()
        return tuple(values) if checksum == self._checksum(values) else None

    def write(self, words: memoryview, *values: int) -> None:
        """Replaces the values; who reads meanwhile finds nothing."""
        words[self.first + self.count] = 0
        for place, value in enumerate(values, self.first):
            words[place] = value
        words[self.first + self.count] = self._checksum(values)

    def erase(self, words: memoryview) -> None:
        """From now on there is nothing to read."""
        for place in range(self.first, self.first + self.count + 1):
            words[place] = 0

    def _checksum(self, values: list[int] | tuple[int, ...]) -> int:
        # The place is part of it: one record's bytes are no other's.
        return xxhash.xxh3_64_intdigest(struct.pack(f"<{self.count}Q", *values), self.first)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a buffer holds, as of one instant.

    Attributes:
        state: Empty also where the header is damaged.
        id: The version; ``None`` where empty.
    """

    state: BufferState
    id: VersionId | None


NOTHING = Contents(BufferState.EMPTY, None)


def contents(words: memoryview, table: memoryview) -> Contents:
    """Reads a header; a damaged one, or one that changes meanwhile, counts as empty.

    Args:
        words: The header's words.
        table: The chunks' checksums.
    """
    # One copy, and plain integers to index it: this is read all the time.
    magic, _, word, generation, version, data_bytes, chunk_bytes, ready, whole, found = words[:_IN_ONE_READ].tolist()
    state = _IN_USE.get(word)
    if state is None or magic != MAGIC:
        return NOTHING
    identity = _IDENTITY.pack(owner(words), generation, version, data_bytes, chunk_bytes)
    checksum = xxhash.xxh3_64_intdigest(identity, MAGIC)
    if checksum != found:
        return NOTHING
    if state is BufferState.COMPLETE:
        chunks = -(-data_bytes // chunk_bytes) if chunk_bytes else 0
        if whole != whole_checksum(checksum, ready, table[:chunks]):
            return NOTHING
    return Contents(state, VersionId(generation, version))


def whole_checksum(identity_checksum: int, chunks_ready: int, table: memoryview) -> int:
    """Returns the checksum of a complete version: its identity and all its chunks' checksums."""
    digest = xxhash.xxh3_64(_WHOLE.pack(identity_checksum, chunks_ready))
    digest.update(table)
    return digest.intdigest()


def write_identity(words: memoryview, version: VersionId, data_bytes: int, chunk_bytes: int) -> None:
    """Says whose version the buffer gets; repairs what may have been damaged of the words that never change."""
    rank = owner(words)
    words[Word.MAGIC] = MAGIC
    write_owner(words, rank)
    fields = (version.generation, version.version, data_bytes, chunk_bytes)
    for place, value in enumerate(fields, Word.GENERATION):
        words[place] = value
    words[Word.IDENTITY_CHECKSUM] = xxhash.xxh3_64_intdigest(_IDENTITY.pack(rank, *fields), MAGIC)


def owner(words: memoryview) -> int:
    """Returns the global rank whose shard it is: what two of three words say."""
    first, second, third = _OWNERS
    one, two = words[first], words[second]
    found: int = one if one == two or one == words[third] else two
    return found


def write_owner(words: memoryview, rank: int) -> None:
    """Notes the global rank whose shard it is."""
    for place in _OWNERS:
        words[place] = rank


def fact(words: memoryview, place: Word) -> bool:
    """Reads a word that says yes or no: as most of its bits do."""
    return bin(words[place]).count("1") > 32


def write_fact(words: memoryview, place: Word, true: bool) -> None:
    """Writes a word that says yes or no."""
    words[place] = _ALL_ONES if true else 0
