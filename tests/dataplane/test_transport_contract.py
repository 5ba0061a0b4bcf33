"""What every transport keeps to, whatever carries the bytes; run against a real holder.

A new transport gets a rig, see :mod:`tests.dataplane.rigs`, and must pass as it is.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer, BufferState, chunk_bytes_for
from lightning_gemini.dataplane.transport import ReplicaTransport
from tests.dataplane.machines import Machine, complete_ids, content_of, shard_bytes, write_version
from tests.dataplane.rigs import RIGS, Rig
from tests.dataplane.waiting import wait_until

ROOT = Path(__file__).parents[2]
OWNER = 0  # the rank of machine 0, which sends; machine 1 holds its replicas
CHUNK = chunk_bytes_for(1)
SIZE = 3 * CHUNK + 1000
OLD, NEW, NEWER = VersionId(1, 4), VersionId(1, 5), VersionId(1, 6)


@pytest.fixture(params=RIGS, ids=str)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made = RIGS[request.param](tmp_path)
    yield made
    made.close()


@pytest.fixture
def holder(rig: Rig) -> Machine:
    return rig.holder


@pytest.fixture
def transport(rig: Rig) -> Iterator[ReplicaTransport]:
    made = rig.connect()
    yield made
    made.close()
    made.close()


@pytest.fixture
def buffers() -> Iterator[tuple[Buffer, Buffer]]:
    """The owner's slab."""
    pair = Buffer.create(OWNER, SIZE), Buffer.create(OWNER, SIZE)
    yield pair
    for buffer in pair:
        buffer.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


Buffers = tuple[Buffer, Buffer]


def always() -> bool:
    return True


def replica(holder: Machine, version: VersionId) -> Buffer | None:
    """The holder's buffer with this version, complete or not."""
    slab = holder.store.slab(OWNER)
    return next((buffer for buffer in slab.buffers if buffer.id == version), None) if slab else None


def received(holder: Machine, version: VersionId) -> int:
    """Chunks of this version that have arrived."""
    buffer = replica(holder, version)
    return buffer.chunks_ready if buffer is not None else -1


def push_in_background(
    threads: ThreadPoolExecutor, transport: ReplicaTransport, buffer: Buffer, version: VersionId
) -> Future[bool]:
    return threads.submit(transport.push, buffer, version, always)


def assert_only_the_old_version_is_there(holder: Machine) -> None:
    wait_until(lambda: replica(holder, NEW) is None, "the torn version is dropped")
    assert complete_ids(holder.store.slab(OWNER)) == [OLD]
    kept = holder.store.complete_buffer(OWNER, OLD)
    assert kept is not None
    assert content_of(kept) == shard_bytes(OWNER, OLD, SIZE)


def assert_the_next_push_works(rig: Rig, transport: ReplicaTransport, buffer: Buffer) -> None:
    content = write_version(buffer, NEWER, SIZE)
    wait_until(lambda: pushed(rig.again(transport), buffer, NEWER), "the peer takes the next version")
    kept = rig.holder.store.complete_buffer(OWNER, NEWER)
    assert kept is not None
    assert content_of(kept) == content


def pushed(transport: ReplicaTransport, buffer: Buffer, version: VersionId) -> bool:
    try:
        return transport.push(buffer, version, always)
    except OSError:
        return False  # as the replicator: try again


# -- push --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, SIZE])
def test_a_pushed_version_is_complete_and_equal(
    transport: ReplicaTransport, holder: Machine, buffers: Buffers, size: int
) -> None:
    content = write_version(buffers[0], NEW, size)
    assert transport.push(buffers[0], NEW, always)
    kept = holder.store.complete_buffer(OWNER, NEW)
    assert kept is not None
    assert content_of(kept) == content
    assert not kept.retrieved


def test_chunks_travel_while_the_writer_is_still_sealing(
    transport: ReplicaTransport, holder: Machine, buffers: Buffers, threads: ThreadPoolExecutor
) -> None:
    write_version(buffers[0], NEW, SIZE, until_byte=0)
    pushing = push_in_background(threads, transport, buffers[0], NEW)
    for sealed in range(3):
        wait_until(lambda sealed=sealed: received(holder, NEW) == sealed, f"{sealed} chunks arrive")  # type: ignore[misc]
        assert buffers[0].state is BufferState.WRITING
        assert not pushing.done()
        buffers[0].seal((sealed + 1) * CHUNK)
    buffers[0].seal(SIZE)
    assert pushing.result(20.0)
    assert complete_ids(holder.store.slab(OWNER)) == [NEW]


def test_one_connection_carries_many_versions(transport: ReplicaTransport, holder: Machine, buffers: Buffers) -> None:
    for number in range(1, 8):
        version = VersionId(1, number)
        write_version(buffers[number % 2], version, 5000 + number)
        assert transport.push(buffers[number % 2], version, always)
    assert complete_ids(holder.store.slab(OWNER)) == [VersionId(1, 7), VersionId(1, 6)]


def test_what_the_peer_has_is_not_sent_again(transport: ReplicaTransport, holder: Machine, buffers: Buffers) -> None:
    write_version(buffers[0], NEW, SIZE)
    assert transport.push(buffers[0], NEW, always)
    write_version(buffers[1], NEW, SIZE, until_byte=0)  # not a chunk of it could be sent
    assert transport.push(buffers[1], NEW, always)


def test_a_shard_that_has_grown_is_taken(transport: ReplicaTransport, holder: Machine, buffers: Buffers) -> None:
    for number, size in enumerate((100, SIZE, 2 * SIZE, 50), start=1):
        version = VersionId(1, number)
        content = write_version(buffers[number % 2], version, size)
        assert transport.push(buffers[number % 2], version, always)
        kept = holder.store.complete_buffer(OWNER, version)
        assert kept is not None
        assert content_of(kept) == content


# -- push, interrupted: the previous version stays, the torn one never counts ------------------------------------------


@pytest.fixture
def half_sent(
    transport: ReplicaTransport, holder: Machine, buffers: Buffers, threads: ThreadPoolExecutor
) -> Iterator[Future[bool]]:
    """The old version is on the peer; two of the new one's four chunks are."""
    write_version(buffers[0], OLD, SIZE)
    assert transport.push(buffers[0], OLD, always)
    write_version(buffers[1], NEW, SIZE, until_byte=2 * CHUNK)
    pushing = push_in_background(threads, transport, buffers[1], NEW)
    wait_until(lambda: received(holder, NEW) == 2, "half of it arrives")
    yield pushing
    buffers[1].drop()


def test_a_version_whose_writer_died_is_given_up(
    rig: Rig, half_sent: Future[bool], transport: ReplicaTransport, holder: Machine, buffers: Buffers
) -> None:
    buffers[1].drop()  # as the agent does for a worker that died
    assert half_sent.result(20.0) is False
    assert_only_the_old_version_is_there(holder)
    assert_the_next_push_works(rig, transport, buffers[1])


def test_a_version_that_was_overwritten_on_the_way_is_given_up(
    half_sent: Future[bool], holder: Machine, buffers: Buffers
) -> None:
    write_version(buffers[1], NEWER, SIZE)
    assert half_sent.result(20.0) is False
    assert_only_the_old_version_is_there(holder)


def test_a_version_that_is_not_wanted_any_more_is_given_up(
    rig: Rig, transport: ReplicaTransport, holder: Machine, buffers: Buffers, threads: ThreadPoolExecutor
) -> None:
    write_version(buffers[0], OLD, SIZE)
    assert transport.push(buffers[0], OLD, always)
    write_version(buffers[1], NEW, SIZE, until_byte=2 * CHUNK)
    wanted = threading.Event()
    wanted.set()
    pushing = threads.submit(transport.push, buffers[1], NEW, wanted.is_set)
    wait_until(lambda: received(holder, NEW) == 2, "half of it arrives")
    wanted.clear()
    assert pushing.result(20.0) is False
    assert_only_the_old_version_is_there(holder)
    assert_the_next_push_works(rig, transport, buffers[1])


def test_a_connection_that_breaks_leaves_the_old_version(
    rig: Rig, half_sent: Future[bool], transport: ReplicaTransport, holder: Machine, buffers: Buffers
) -> None:
    rig.disconnect()
    buffers[1].seal(SIZE)
    with pytest.raises(OSError):  # noqa: PT011 - any kind
        half_sent.result(20.0)
    assert_only_the_old_version_is_there(holder)
    assert_the_next_push_works(rig, transport, buffers[1])


def test_bytes_that_do_not_match_their_checksum_never_count(
    rig: Rig, half_sent: Future[bool], transport: ReplicaTransport, holder: Machine, buffers: Buffers
) -> None:
    buffers[1].seal_chunk(2, 1234)
    buffers[1].seal(SIZE)
    with pytest.raises(OSError):  # noqa: PT011 - any kind
        half_sent.result(20.0)
    assert_only_the_old_version_is_there(holder)
    assert_the_next_push_works(rig, transport, buffers[1])


def test_a_version_that_the_peer_forgot_meanwhile_never_counts(
    half_sent: Future[bool], holder: Machine, buffers: Buffers
) -> None:
    """A recovery goes back behind it while it is still arriving."""
    holder.store.resume_from(OLD)
    buffers[1].seal(SIZE)
    with pytest.raises(OSError):  # noqa: PT011 - any kind
        half_sent.result(20.0)
    assert_only_the_old_version_is_there(holder)


def test_another_thread_can_end_a_push_at_once(
    half_sent: Future[bool], transport: ReplicaTransport, holder: Machine, buffers: Buffers
) -> None:
    transport.abort()
    buffers[1].seal(SIZE)
    with pytest.raises(OSError):  # noqa: PT011 - any kind
        half_sent.result(5.0)
    assert_only_the_old_version_is_there(holder)
    with pytest.raises(OSError):  # noqa: PT011 - any kind
        transport.push(buffers[0], OLD, always)  # and it stays ended


def test_a_sender_that_is_killed_leaves_the_old_version(rig: Rig, holder: Machine, buffers: Buffers) -> None:
    write_version(buffers[0], OLD, SIZE)
    transport = rig.connect()
    assert transport.push(buffers[0], OLD, always)
    arguments = [*rig.sender(), str(OWNER), str(NEW.version), str(SIZE), str(2 * CHUNK)]
    sender = subprocess.Popen([sys.executable, "-m", "tests.dataplane.doomed_sender", *arguments], cwd=ROOT)
    try:
        wait_until(lambda: received(holder, NEW) == 2, "half of it arrives")
    finally:
        sender.kill()
        assert sender.wait() == -9
    assert_only_the_old_version_is_there(holder)
    assert_the_next_push_works(rig, transport, buffers[1])
    transport.close()


def test_what_was_given_up_makes_room_before_the_common_version(
    transport: ReplicaTransport, holder: Machine, buffers: Buffers, threads: ThreadPoolExecutor
) -> None:
    """All ranks keep the old version and gave up the new one, which reached this peer whole."""
    write_version(buffers[0], OLD, SIZE)
    write_version(buffers[1], NEW, SIZE)
    assert transport.push(buffers[0], OLD, always)
    assert transport.push(buffers[1], NEW, always, OLD)
    write_version(buffers[1], NEWER, SIZE, until_byte=CHUNK)
    pushing = threads.submit(transport.push, buffers[1], NEWER, always, OLD)
    wait_until(lambda: received(holder, NEWER) == 1, "the first chunk arrives")
    assert complete_ids(holder.store.slab(OWNER)) == [OLD]
    buffers[1].seal(SIZE)
    assert pushing.result(20.0)
    assert complete_ids(holder.store.slab(OWNER)) == [NEWER, OLD]


def test_two_senders_of_one_shard_do_not_mix(
    rig: Rig, holder: Machine, buffers: Buffers, half_sent: Future[bool]
) -> None:
    """An owner that restarted, and its older self that is still connected."""
    write_version(buffers[0], NEWER, SIZE)
    second = rig.connect()
    with pytest.raises(OSError, match="still receiving"):
        second.push(buffers[0], NEWER, always)
    second.close()
    buffers[1].seal(SIZE)
    assert half_sent.result(20.0)
    assert complete_ids(holder.store.slab(OWNER)) == [NEW, OLD]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [0, 1, 3])
def test_a_sender_of_another_generation_is_refused(
    rig: Rig, holder: Machine, buffers: Buffers, generation: int
) -> None:
    holder.store.enter_generation(2, 2, 1)
    write_version(buffers[0], NEW, SIZE)
    transport = rig.connect(generation)
    with pytest.raises(OSError, match=f"machine 1 refused: is in generation 2, the sender in {generation}"):
        transport.push(buffers[0], NEW, always)
    transport.close()
    assert not holder.store.slabs()


def test_an_older_version_of_a_sender_in_this_generation_is_taken(rig: Rig, holder: Machine, buffers: Buffers) -> None:
    """After a recovery the version that everybody resumed from is replicated again."""
    holder.store.enter_generation(2, 2, 1)
    write_version(buffers[0], NEW, SIZE)
    transport = rig.connect(2)
    assert transport.push(buffers[0], NEW, always)
    transport.close()
    assert complete_ids(holder.store.slab(OWNER)) == [NEW]


def test_a_shard_that_is_not_hosted_is_refused(transport: ReplicaTransport, holder: Machine) -> None:
    stranger = Buffer.create(17, 100)
    write_version(stranger, NEW, 100)
    with pytest.raises(OSError, match="does not hold replicas of rank 17"):
        transport.push(stranger, NEW, always)
    stranger.close()
    assert not holder.store.slabs()


def test_a_peer_that_is_away_is_an_error(rig: Rig, buffers: Buffers) -> None:
    write_version(buffers[0], NEW, SIZE)
    transport = rig.connect_to_nobody()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011 - any kind
            transport.push(buffers[0], NEW, always)
    assert time.monotonic() - began < 15.0
    transport.close()
