"""Slabs: what counts as complete, what a flipped bit does, and two processes on one buffer."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import capacity, slab, wire
from lightning_gemini.dataplane.slab import (
    CHUNK_SLOTS,
    HEADER_BYTES,
    Buffer,
    BufferState,
    Slab,
    chunk_bytes_for,
)
from lightning_gemini.errors import CapacityError, IntegrityError
from tests.dataplane.machines import content_of, shard_bytes, write_version

ROOT = Path(__file__).parents[2]
FIRST, SECOND = VersionId(1, 7), VersionId(1, 8)


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    made = Buffer.create(3, 200_000)
    yield made
    made.close()


# -- one process -------------------------------------------------------------------------------------------------------


def test_a_new_buffer_is_empty(buffer: Buffer) -> None:
    assert (buffer.owner, buffer.state, buffer.id, buffer.acked) == (3, BufferState.EMPTY, None, None)
    assert (buffer.progress, buffer.retrieved, buffer.chunks, buffer.chunks_ready) == (0, False, 0, 0)
    with pytest.raises(IntegrityError, match="expected a complete buffer, found EMPTY"):
        buffer.verify()


def test_a_version_counts_once_every_chunk_is_sealed(buffer: Buffer, small_chunks: int) -> None:
    size = 3 * small_chunks + 5
    buffer.begin(FIRST, size)
    buffer.data[:size] = shard_bytes(3, FIRST, size)
    assert (buffer.id, buffer.state, buffer.chunks) == (FIRST, BufferState.WRITING, 4)
    for sealed, ready in ((0, 0), (small_chunks - 1, 0), (small_chunks, 1), (3 * small_chunks + 4, 3), (size, 4)):
        with pytest.raises(IntegrityError, match=f"{buffer.chunks_ready} of 4 chunks"):
            buffer.complete()
        buffer.seal(sealed)
        assert buffer.chunks_ready == ready
    with pytest.raises(IntegrityError, match="found WRITING"):
        buffer.verify()
    buffer.complete()
    assert content_of(buffer) == shard_bytes(3, FIRST, size)


def test_a_version_that_was_dropped_while_it_was_written_never_counts(buffer: Buffer) -> None:
    write_version(buffer, FIRST, 1000, until_byte=1000)
    buffer.drop()
    with pytest.raises(IntegrityError, match="given up"):
        buffer.complete()
    assert buffer.id is None


def test_a_shard_without_bytes_is_a_version_too(buffer: Buffer) -> None:
    write_version(buffer, FIRST, 0)
    assert content_of(buffer) == b""


def test_what_peers_and_the_owner_say_is_kept_over_versions(buffer: Buffer) -> None:
    buffer.report_progress(41)
    buffer.begin(FIRST, 10, retrieved=True)
    assert buffer.retrieved
    buffer.seal(10)
    buffer.complete()
    buffer.acknowledge(FIRST)
    buffer.forget_origin()
    assert (buffer.acked, buffer.progress, buffer.retrieved) == (FIRST, 41, False)
    write_version(buffer, SECOND, 10)
    assert (buffer.acked, buffer.progress) == (FIRST, 41)  # an acknowledgement names its version: no need to clear it
    buffer.forget_peers()
    assert buffer.acked is None
    buffer.acknowledge(VersionId(0, 0))
    assert buffer.acked == VersionId(0, 0)
    buffer.verify()


def test_a_slab_knows_its_newest_versions_by_generation_first() -> None:
    both = Slab.create(5, 100)
    first, second = both.buffers
    assert both.newest_started() is None
    write_version(first, VersionId(1, 9), 100)
    write_version(second, VersionId(2, 3), 100, until_byte=50)
    assert [found.id for found in both.complete()] == [VersionId(1, 9)]
    assert both.newest_started() is second
    assert both.holding(VersionId(2, 3)) is None
    second.seal(100)
    second.complete()
    assert [found.id for found in both.complete()] == [VersionId(2, 3), VersionId(1, 9)]
    assert both.holding(VersionId(1, 9)) is first
    assert both.holding(VersionId(1, 8)) is None
    assert both.owner == 5
    both.close()


@given(size=st.integers(0, wire.MAX_SHARD_BYTES))
def test_every_shard_fits_the_checksum_table_and_the_wire(size: int) -> None:
    chunk = chunk_bytes_for(size)
    assert slab.MIN_CHUNK_BYTES <= chunk <= wire.MAX_CHUNK_BYTES
    assert chunk % 65536 == 0
    assert -(-size // chunk) <= CHUNK_SLOTS


@pytest.mark.parametrize(
    ("size", "mib"), [(1, 1), (128 << 20, 1), (1 << 30, 8), (9 << 30, 64), (100 << 30, 64), (1 << 40, 256)]
)
def test_large_shards_have_few_chunks(size: int, mib: int) -> None:
    assert chunk_bytes_for(size) == mib << 20


# -- flipped bits ------------------------------------------------------------------------------------------------------


def flip(buffer: Buffer, offset: int, bit: int = 0) -> None:
    view = memoryview(buffer._mapping)
    view[offset] ^= 1 << bit


def test_a_flip_names_its_chunk(buffer: Buffer, small_chunks: int) -> None:
    size = 2 * small_chunks + 1
    write_version(buffer, FIRST, size)
    edges = {0: 0, small_chunks - 1: 0, small_chunks: 1, 2 * small_chunks - 1: 1, 2 * small_chunks: 2}
    for offset, chunk in edges.items():
        flip(buffer, HEADER_BYTES + offset)
        with pytest.raises(IntegrityError, match=f"rank 3, version .*chunk {chunk} is corrupt"):
            buffer.verify()
        flip(buffer, HEADER_BYTES + offset)


class BufferHistory(RuleBasedStateMachine):
    """Any order of beginning, sealing, dropping and completing: what is complete is whole."""

    @initialize()
    def create(self) -> None:
        self.buffer = Buffer.create(0, 100)
        self.size, self.sealed, self.version, self.writing, self.whole = 0, 0, 0, False, False

    @rule(size=st.integers(0, 150_000))
    def begin(self, size: int) -> None:
        self.version += 1
        self.size, self.sealed, self.writing, self.whole = size, 0, True, False
        self.buffer.begin(VersionId(1, self.version), size)
        self.buffer.data[:size] = shard_bytes(0, VersionId(1, self.version), size)

    @precondition(lambda self: self.writing)
    @rule(part=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    def seal(self, part: float) -> None:
        self.sealed = max(self.sealed, int(part * self.size))
        self.buffer.seal(self.sealed)

    @rule()
    def drop(self) -> None:
        self.writing = self.whole = False
        self.buffer.drop()

    @rule()
    def complete(self) -> None:
        if self.writing and self.sealed == self.size:
            self.buffer.complete()
            self.whole, self.writing = True, False
        else:
            with pytest.raises(IntegrityError):
                self.buffer.complete()

    @invariant()
    def what_is_complete_is_whole(self) -> None:
        assert (self.buffer.state is BufferState.COMPLETE) == self.whole
        if self.whole:
            assert content_of(self.buffer) == shard_bytes(0, VersionId(1, self.version), self.size)
        else:
            with pytest.raises(IntegrityError):
                self.buffer.verify()

    def teardown(self) -> None:
        self.buffer.close()


TestBufferHistory = BufferHistory.TestCase
TestBufferHistory.settings = settings(max_examples=25, stateful_step_count=20)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_buffer_grows_with_its_shard(buffer: Buffer) -> None:
    write_version(buffer, FIRST, 100)
    before = os.fstat(buffer.fd).st_size
    content = write_version(buffer, SECOND, 3_000_000)
    assert os.fstat(buffer.fd).st_size >= before + 2_000_000
    assert (buffer.owner, content_of(buffer) == content) == (3, True)


def test_memory_that_is_short_refuses_a_new_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda: 300 * 2**20)
    before = open_descriptors()
    with pytest.raises(CapacityError, match=r"cannot allocate 100 MiB of shared memory: 300 MiB available \(256 MiB"):
        Buffer.create(0, 100 * 2**20)
    with pytest.raises(CapacityError):
        Slab.create(0, 100 * 2**20)
    assert open_descriptors() == before


def test_memory_that_is_short_refuses_growth_and_spares_the_other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Slab.create(0, 1000)
    kept = write_version(both.buffers[0], FIRST, 1000)
    monkeypatch.setattr(capacity, "available_bytes", lambda: 256 * 2**20)
    with pytest.raises(CapacityError, match="cannot allocate"):
        both.buffers[1].begin(SECOND, 50 * 2**20)
    assert both.buffers[1].id is None
    assert content_of(both.buffers[0]) == kept
    both.buffers[1].begin(SECOND, 1000)  # what there is can still be used
    both.close()


def test_closing_frees_the_descriptors_and_leaves_an_empty_buffer_to_other_threads() -> None:
    before = open_descriptors()
    made = Slab.create(0, 1000)
    write_version(made.buffers[0], FIRST, 1000)
    made.close()
    made.close()
    assert open_descriptors() == before
    assert made.buffers[0].id is None
    assert not list(made.complete())
    made.buffers[0].drop()
    made.buffers[0].acknowledge(FIRST)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- two processes -----------------------------------------------------------------------------------------------------

Say = Callable[..., None]


class Writer:
    """A process that has the buffer by its descriptor and writes it."""

    def __init__(self, buffer: Buffer) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.dataplane.slab_writer", str(buffer.fd)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[buffer.fd],
        )
        assert self.answer().split() == ["attached", str(buffer.owner), str(len(buffer.data))]

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        assert self.answer() == "done\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def writer(buffer: Buffer) -> Iterator[Writer]:
    made = Writer(buffer)
    yield made
    made.end()


def test_a_reader_sees_chunks_as_another_process_seals_them(buffer: Buffer, writer: Writer) -> None:
    mebibyte = 1 << 20
    size = 2 * mebibyte + 10
    writer.tell("begin", 1, 7, size)  # grows the buffer, too
    content = shard_bytes(3, FIRST, size)
    assert (buffer.id, buffer.state, buffer.chunks_ready) == (FIRST, BufferState.WRITING, 0)
    writer.tell("seal", mebibyte)
    assert buffer.chunks_ready == 1
    assert not buffer.fits(size)
    assert bytes(buffer.chunk(0)) == content[:mebibyte]  # maps what the other process has grown
    writer.tell("seal", size)
    writer.tell("complete")
    writer.tell("progress", 12)
    assert content_of(buffer) == content
    assert buffer.progress == 12


def test_a_writer_that_is_killed_leaves_no_complete_version(buffer: Buffer, writer: Writer) -> None:
    writer.tell("begin", 1, 7, 100_000)
    writer.tell("seal", 100_000)  # every byte is there, but nobody said that the version is complete
    writer.end()
    assert (buffer.id, buffer.state) == (FIRST, BufferState.WRITING)
    with pytest.raises(IntegrityError, match="found WRITING"):
        buffer.verify()
    write_version(buffer, SECOND, 100_000)  # and the next one has the buffer
    buffer.verify()


def test_what_a_killed_writer_completed_stays(buffer: Buffer, writer: Writer) -> None:
    writer.tell("begin", 1, 7, 100_000)
    writer.tell("seal", 100_000)
    writer.tell("complete")
    writer.end()
    assert content_of(buffer) == shard_bytes(3, FIRST, 100_000)


def test_a_copy_that_was_taken_while_another_thread_wrote_is_recognised() -> None:
    """Whatever the interleaving: a copy of a complete buffer that still verifies with the same id is that version."""
    both = Buffer.create(0, 70_000)
    write_version(both, VersionId(1, 0), 70_000)
    stop = threading.Event()

    def write_on() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write_version(both, VersionId(1, number), 70_000)
            stop.wait(0.001 * (number % 3))

    thread = threading.Thread(target=write_on)
    thread.start()
    seen = torn = 0
    try:
        while seen < 20 and torn < 5000:
            version = both.id
            if both.state is not BufferState.COMPLETE:
                continue
            copy = bytes(both.data[:70_000])
            try:
                both.verify()
            except IntegrityError:
                torn += 1
                continue
            if version is not None and both.id == version:
                seen += 1
                assert copy == shard_bytes(0, version, 70_000)
    finally:
        stop.set()
        thread.join()
        both.close()
    assert seen
