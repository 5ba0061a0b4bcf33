"""Shards that come back from a holder after a failure: always from agent to agent, over TCP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import HEADER_BYTES, Buffer, chunk_bytes_for
from lightning_gemini.dataplane.transport import TcpTransport
from lightning_gemini.errors import IntegrityError
from tests.dataplane.machines import Machine, complete_ids, content_of, shard_bytes, write_version

OWNER = 0  # the rank of machine 0, which lost its memory; machine 1 holds its replicas
CHUNK = chunk_bytes_for(1)
SIZE = 3 * CHUNK + 1000
OLD, NEW, NEWER = VersionId(1, 4), VersionId(1, 5), VersionId(1, 6)


@pytest.fixture
def holder() -> Iterator[Machine]:
    with Machine(1) as machine:
        yield machine


@pytest.fixture
def buffers() -> Iterator[tuple[Buffer, Buffer]]:
    pair = Buffer.create(OWNER, SIZE), Buffer.create(OWNER, SIZE)
    yield pair
    for buffer in pair:
        buffer.close()


@pytest.fixture
def transport(holder: Machine, owner: Machine) -> Iterator[TcpTransport]:
    made = owner.transport_to(holder.peer)
    yield made
    made.close()
    made.close()


def hold(holder: Machine, version: VersionId, size: int = SIZE) -> Buffer:
    """Let the holder have a version of the owner's shard."""
    buffer = holder.store.replica_target(OWNER, version, size, holder.store.generation)
    assert buffer is not None
    write_version(buffer, version, size)
    return buffer


@pytest.fixture
def owner() -> Iterator[Machine]:
    """A machine that lost its memory and gets its shard back."""
    with Machine(0) as machine:
        yield machine


@pytest.mark.parametrize("size", [0, 1, CHUNK, SIZE])
def test_a_fetched_shard_is_complete_equal_and_marked(
    transport: TcpTransport, holder: Machine, owner: Machine, size: int
) -> None:
    hold(holder, NEW, size)
    assert transport.fetch(OWNER, NEW, owner.retrieval(OWNER, NEW)) == size
    back = owner.store.complete_buffer(OWNER, NEW)
    assert back is not None
    assert content_of(back) == shard_bytes(OWNER, NEW, size)
    assert back.retrieved


def test_pushes_and_fetches_may_alternate(
    transport: TcpTransport, holder: Machine, owner: Machine, buffers: tuple[Buffer, Buffer]
) -> None:
    for number in (1, 2, 3):
        version = VersionId(1, number)
        write_version(buffers[0], version, SIZE)
        assert transport.push(buffers[0], version, lambda: True)
        assert transport.fetch(OWNER, version, owner.retrieval(OWNER, version)) == SIZE


@pytest.mark.parametrize("wanted", [OLD, VersionId(2, NEW.version)])
def test_a_version_that_the_peer_has_not_is_refused(
    transport: TcpTransport, holder: Machine, owner: Machine, wanted: VersionId
) -> None:
    hold(holder, NEW)
    with pytest.raises(OSError, match="does not hold"):
        transport.fetch(OWNER, wanted, owner.retrieval(OWNER, wanted))
    assert owner.store.slab(OWNER) is None  # not a byte of memory was taken for it
    assert transport.fetch(OWNER, NEW, owner.retrieval(OWNER, NEW)) == SIZE


def test_an_unfinished_version_is_not_given_out(transport: TcpTransport, holder: Machine, owner: Machine) -> None:
    hold(holder, OLD)
    holder.store.replica_target(OWNER, NEW, SIZE, 1)
    with pytest.raises(OSError, match="does not hold"):
        transport.fetch(OWNER, NEW, owner.retrieval(OWNER, NEW))


@pytest.mark.parametrize("place", [0, CHUNK + 5, SIZE - 1])
def test_a_corrupt_copy_is_recognised_and_leaves_nothing_complete(
    transport: TcpTransport, holder: Machine, owner: Machine, place: int
) -> None:
    own = owner.store.own(OWNER, SIZE)
    write_version(own.buffers[0], OLD, SIZE)
    buffer = hold(holder, NEW)
    memoryview(buffer._mapping)[HEADER_BYTES + place] ^= 4
    with pytest.raises(IntegrityError, match=f"chunk {place // CHUNK} of rank 0"):
        transport.fetch(OWNER, NEW, owner.retrieval(OWNER, NEW))
    assert complete_ids(own) == [OLD]
    assert own.buffers[1].id is None
    hold(holder, NEWER)
    assert transport.fetch(OWNER, NEWER, owner.retrieval(OWNER, NEWER)) == SIZE
    own.buffers[0].verify()


def test_a_copy_with_a_corrupt_header_is_not_taken(transport: TcpTransport, holder: Machine, owner: Machine) -> None:
    buffer = hold(holder, NEW)
    memoryview(buffer._mapping)[8 * 5 + 1] ^= 1  # the size of the shard
    with pytest.raises((IntegrityError, OSError)):
        transport.fetch(OWNER, NEW, owner.retrieval(OWNER, NEW))
    assert not owner.store.inventory().holdings


def test_a_holder_that_goes_away_in_the_middle_leaves_nothing_complete(
    transport: TcpTransport, holder: Machine, owner: Machine
) -> None:
    size = 32 * CHUNK  # more than sockets take
    hold(holder, NEW, size)

    def allocate(data_bytes: int) -> Buffer:
        holder.server.disconnect()
        return owner.store.retrieval_target(OWNER, NEW, data_bytes)

    with pytest.raises(OSError):  # noqa: PT011 - any kind
        transport.fetch(OWNER, NEW, allocate)
    assert not owner.store.inventory().holdings
    assert transport.fetch(OWNER, NEW, owner.retrieval(OWNER, NEW)) == size
    transport.close()


def test_a_version_that_the_holder_drops_in_the_middle_leaves_nothing_complete(
    transport: TcpTransport, holder: Machine, owner: Machine
) -> None:
    size = 32 * CHUNK
    buffer = hold(holder, NEW, size)

    def allocate(data_bytes: int) -> Buffer:
        buffer.drop()
        return owner.store.retrieval_target(OWNER, NEW, data_bytes)

    with pytest.raises(OSError, match="gave up"):
        transport.fetch(OWNER, NEW, allocate)
    assert not owner.store.inventory().holdings
    transport.close()


def test_another_thread_can_end_a_fetch_at_once(transport: TcpTransport, holder: Machine, owner: Machine) -> None:
    hold(holder, NEW, 32 * CHUNK)

    def allocate(data_bytes: int) -> Buffer:
        transport.abort()
        return owner.store.retrieval_target(OWNER, NEW, data_bytes)

    with pytest.raises(OSError):  # noqa: PT011 - any kind
        transport.fetch(OWNER, NEW, allocate)
    assert not owner.store.inventory().holdings
