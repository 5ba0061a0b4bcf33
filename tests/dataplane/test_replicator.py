"""The replicator: every holder gets every newest version, whatever breaks, and nothing is acknowledged too early."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import replicator as replicator_module
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.header import Word
from lightning_gemini.dataplane.replicator import Replicator
from lightning_gemini.dataplane.slab import Buffer, Slab
from lightning_gemini.dataplane.transport import Peer, ReplicaTransport
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import AuthenticationError, IntegrityError
from tests.dataplane.machines import JOB, SECRET, Machine, complete_ids, content_of, shard_bytes, write_version
from tests.dataplane.waiting import wait_until

SIZE = 5000


class Replicating(Machine):
    """A machine with its replicator."""

    def __init__(self, rank: int, machines: int, *, nproc: int = 1, replicas: int = 2, generation: int = 1) -> None:
        super().__init__(rank, machines, nproc=nproc, replicas=replicas, generation=generation)
        self.replicator = Replicator(self.store, self.transport_to)
        for owner in self.store.own_ranks():
            self.store.own(owner, SIZE)

    def slab(self, owner: int) -> Slab:
        found = self.store.slab(owner)
        assert found is not None
        return found

    def acknowledged(self, owner: int, version: VersionId) -> bool:
        buffer = self.slab(owner).holding(version)
        return buffer is not None and buffer.acked == version

    def publish(self, owner: int, version: VersionId) -> Buffer:
        """What the worker of this rank does: over the older buffer."""
        slab = self.slab(owner)
        newest = slab.newest_started()
        buffer = slab.buffers[1] if newest is slab.buffers[0] else slab.buffers[0]
        self.replicator.notify()
        write_version(buffer, version, SIZE)
        self.replicator.notify()
        return buffer

    def close(self) -> None:
        self.replicator.close()
        super().close()


@pytest.fixture
def start() -> Iterator[Callable[..., list[Replicating]]]:
    """Starts machines that know each other."""
    with ExitStack() as stack:

        def make(machines: int, **fields: int) -> list[Replicating]:
            made = [stack.enter_context(Replicating(rank, machines, **fields)) for rank in range(machines)]
            introduce(made)
            return made

        yield make


Start = Callable[..., list[Replicating]]


def introduce(machines: list[Replicating]) -> None:
    for machine in machines:
        machine.replicator.start([other.peer for other in machines if other is not machine])


def v(number: int, generation: int = 1) -> VersionId:
    return VersionId(generation, number)


def holders_of(machines: list[Machine], owner: int, version: VersionId) -> list[int]:
    return [machine.rank for machine in machines if machine.store.complete_buffer(owner, version) is not None]


# -- replication -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machines", "replicas"), [(1, 1), (3, 1), (2, 2), (4, 2), (3, 3), (5, 3)])
def test_every_holder_and_nobody_else_gets_every_version(start: Start, machines: int, replicas: int) -> None:
    cluster = start(machines, replicas=replicas)
    placement = cluster[0].store.placement
    assert placement is not None
    for number in range(1, 6):
        for machine in cluster:
            machine.publish(machine.rank, v(number))
        for machine in cluster:
            acked = functools.partial(machine.acknowledged, machine.rank, v(number))
            wait_until(acked, f"version {number} of machine {machine.rank} is acknowledged")
            expected = sorted(placement.holders(machine.rank))
            assert holders_of(list(cluster), machine.rank, v(number)) == expected
            for holder in expected:
                buffer = cluster[holder].store.complete_buffer(machine.rank, v(number))
                assert buffer is not None
                assert content_of(buffer) == shard_bytes(machine.rank, v(number), SIZE)


def test_several_ranks_on_a_machine(start: Start) -> None:
    cluster = start(2, nproc=2)
    for owner in (0, 1):
        cluster[0].publish(owner, v(1))
    for owner in (0, 1):
        wait_until(lambda owner=owner: cluster[0].acknowledged(owner, v(1)), "acknowledged")  # type: ignore[misc]
    assert [complete_ids(cluster[1].store.slab(owner)) for owner in (0, 1)] == [[v(1)], [v(1)]]


def test_chunks_leave_before_the_version_is_complete(start: Start, small_chunks: int) -> None:
    sender, holder = start(2)
    size = 2 * small_chunks
    buffer = sender.slab(0).buffers[0]
    write_version(buffer, v(1), size, until_byte=small_chunks)
    sender.replicator.notify()

    def arrived() -> int:
        slab = holder.store.slab(0)
        return max(buffer.chunks_ready for buffer in slab.buffers) if slab else 0

    wait_until(lambda: arrived() == 1, "the first chunk arrives")
    assert buffer.acked is None
    buffer.seal(size)
    buffer.complete()
    sender.replicator.notify()
    wait_until(lambda: buffer.acked == v(1), "acknowledged")


def test_without_a_notice_it_is_noticed_too(start: Start) -> None:
    sender, holder = start(2)
    write_version(sender.slab(0).buffers[0], v(1), SIZE)
    wait_until(lambda: sender.slab(0).buffers[0].acked == v(1), "acknowledged")
    assert complete_ids(holder.store.slab(0)) == [v(1)]


def test_what_was_missed_in_between_is_not_sent_any_more(start: Start) -> None:
    sender, holder = start(2)
    holder.server.close()
    for number in (1, 2, 3):
        sender.publish(0, v(number))
    sender.replicator.notify()
    with Replicating(1, 2) as back:
        sender.replicator.start([back.peer])
        wait_until(lambda: sender.acknowledged(0, v(3)), "the newest is acknowledged")
        assert complete_ids(back.store.slab(0)) == [v(3)]


# -- acknowledgements --------------------------------------------------------------------------------------------------


def test_nothing_is_acknowledged_before_all_holders_have_it(start: Start) -> None:
    cluster = start(3, replicas=3)
    cluster[2].server.close()
    cluster[0].publish(0, v(1))
    wait_until(lambda: complete_ids(cluster[1].store.slab(0)) == [v(1)], "one holder has it")
    held_by_one = lambda: (0, 1) in cluster[0].replicator._held  # noqa: E731
    wait_until(held_by_one, "and said so")
    cluster[0].replicator.notify()
    assert cluster[0].slab(0).buffers[0].acked is None
    with Replicating(2, 3, replicas=3) as back:
        cluster[0].replicator.start([cluster[1].peer, back.peer])
        wait_until(lambda: cluster[0].slab(0).buffers[0].acked == v(1), "acknowledged")


def test_a_peer_that_restarts_empty_catches_up(start: Start) -> None:
    sender, holder = start(2)
    sender.publish(0, v(1))
    wait_until(lambda: sender.slab(0).buffers[0].acked == v(1), "acknowledged")
    holder.close()
    with Replicating(1, 2) as back:
        introduce([sender, back])
        wait_until(lambda: complete_ids(back.store.slab(0)) == [v(1)], "the new machine has it")
        sender.publish(0, v(2))
        wait_until(lambda: sender.acknowledged(0, v(2)), "and the next")


def test_a_broken_link_is_taken_up_again(start: Start) -> None:
    sender, holder = start(2)
    for number in range(1, 6):
        sender.publish(0, v(number))
        holder.server.disconnect()
        wait_until(lambda number=number: sender.acknowledged(0, v(number)), "acknowledged")  # type: ignore[misc]


def test_what_one_generation_held_means_nothing_to_the_next(start: Start) -> None:
    """The machine of a rank may be another one, without memory."""
    sender, holder = start(2)
    buffer = sender.publish(0, v(1))
    wait_until(lambda: buffer.acked == v(1), "acknowledged")
    holder.server.close()
    sender.replicator.close()  # as the agent does when it enters a generation
    buffer.forget_peers()
    sender.replicator.start([holder.peer])
    sender.replicator.notify()
    assert buffer.acked is None
    assert not sender.replicator._held


class SlowTransport:
    """Succeeds, but only when it is allowed to."""

    def __init__(self, release: Callable[[], bool]) -> None:
        self._release, self.aborted = release, False

    def push(self, *_: object) -> bool:
        wait_until(self._release, "the test lets the transport succeed")
        return True

    def fetch(self, owner: int, version: VersionId, allocate: Callable[[int], Buffer]) -> int:
        raise NotImplementedError

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        pass


def test_a_push_that_ends_after_its_generation_acknowledges_nothing() -> None:
    """Its success says that the machine which was rank 1 has the version, not the one that is."""
    released = False
    made: list[SlowTransport] = []

    def connect(peer: Peer) -> ReplicaTransport:
        made.append(SlowTransport(lambda: released))
        return made[-1]

    with Machine(0) as sender:
        sender.store.own(0, SIZE)
        slow = Replicator(sender.store, connect)
        slow.start([Peer(1, ("127.0.0.1", 1))])
        slab = sender.store.slab(0)
        assert slab is not None
        buffer = slab.buffers[0]
        write_version(buffer, v(1), SIZE)
        slow.notify()
        wait_until(lambda: len(made) == 1, "the push began")
        slow.start([])
        assert made[0].aborted
        released = True
        wait_until(lambda: not threads_named("replicate-1"), "the old thread ended")
        slow.notify()
        assert not slow._held
        assert buffer.acked is None
        slow.close()


def threads_named(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == name]


def test_closing_ends_the_threads_at_once(start: Start) -> None:
    sender, holder = start(2)
    buffer = sender.slab(0).buffers[0]
    write_version(buffer, v(1), SIZE, until_byte=0)  # never goes on
    sender.replicator.notify()
    wait_until(lambda: holder.store.slab(0) is not None, "the push began")
    sender.replicator.close()
    sender.replicator.close()
    wait_until(lambda: not threads_named("replicate-1"), "the thread ended", timeout_s=5.0)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_peer_that_stays_away_is_reported_once(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicator_module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(replicator_module, "_RETRY_S", 0.01)
    sender, holder = start(2)
    holder.server.close()
    sender.publish(0, v(1))
    tries = []

    def connect(peer: Peer) -> ReplicaTransport:
        tries.append(peer)
        return sender.transport_to(peer)

    monkeypatch.setattr(sender.replicator, "_connect", connect)
    sender.replicator.start([holder.peer])
    wait_until(lambda: caplog.records, "a warning")
    so_far = len(tries)
    wait_until(lambda: len(tries) > so_far + 5, "more tries")
    assert [record.message.split(",")[0] for record in caplog.records] == ["cannot replicate to machine 1"]


def test_an_unexpected_error_ends_no_thread(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(replicator_module, "_RETRY_S", 0.01)
    broken = True
    with Machine(1) as holder, Machine(0) as sender:

        def connect(peer: Peer) -> ReplicaTransport:
            if broken:
                raise ValueError("nobody thought of this")
            return sender.transport_to(peer)

        sender.store.own(0, SIZE)
        replicator = Replicator(sender.store, connect)
        replicator.start([holder.peer])
        slab = sender.store.slab(0)
        assert slab is not None
        write_version(slab.buffers[0], v(1), SIZE)
        replicator.notify()
        wait_until(lambda: "nobody thought of this" in caplog.text, "it is reported")
        broken = False
        wait_until(lambda: slab.buffers[0].acked == v(1), "and tried again")
        replicator.close()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_a_version_that_all_ranks_gave_up_does_not_cost_the_common_one(start: Start) -> None:
    """Invariant 1: while 3 travels, 1 is complete on the holder, although 2 was complete there."""
    sender, holder = start(2)
    slab = sender.slab(0)
    replicate_in_turn(sender, 1, 2)
    slab.buffers[1].drop()  # some other rank could not write version 2
    write_version(slab.buffers[1], v(3), SIZE, until_byte=0)
    sender.replicator.notify()
    assert kept_while_coming(holder, v(3)) == [v(1)]


def replicate_in_turn(sender: Replicating, *numbers: int) -> None:
    for buffer, number in zip(sender.slab(0).buffers, numbers, strict=True):
        write_version(buffer, v(number), SIZE)
        sender.replicator.notify()
        wait_until(lambda buffer=buffer, number=number: buffer.acked == v(number), "acknowledged")  # type: ignore[misc]


def kept_while_coming(holder: Replicating, version: VersionId) -> list[VersionId | None]:
    """What the holder keeps of rank 0 while it receives this version."""
    theirs = holder.store.slab(0)
    assert theirs is not None
    wait_until(lambda: version in [buffer.id for buffer in theirs.buffers], f"{version} is on its way")
    return complete_ids(theirs)


def test_an_owner_whose_committed_copy_is_damaged_does_not_cost_the_holders_too(start: Start) -> None:
    """Judging by what lies beside version 3 there, version 2 would seem to have been given up."""
    sender, holder = start(2)
    replicate_in_turn(sender, 1, 2)
    slab = sender.slab(0)
    slab.note_committed(v(2))
    slab.buffers[1]._words[Word.VERSION] ^= 1 << 40
    write_version(slab.buffers[1], v(3), SIZE, until_byte=0)
    sender.replicator.notify()
    assert kept_while_coming(holder, v(3)) == [v(2)]


def test_a_holder_knows_what_is_committed_where_the_owner_is_new(start: Start) -> None:
    """Version 2 was given up; an owner that lost its memory, and has nothing but version 3, cannot say so."""
    sender, holder = start(2)
    replicate_in_turn(sender, 1, 2)
    holder.slab(1).note_committed(v(1))
    for buffer in sender.slab(0).buffers:
        buffer.drop()
    write_version(sender.slab(0).buffers[0], v(3), SIZE, until_byte=0)
    sender.replicator.notify()
    assert kept_while_coming(holder, v(3)) == [v(1)]


# -- memory that loses bits ------------------------------------------------------------------------------------------


def test_an_acknowledgement_that_was_damaged_is_noted_again(start: Start) -> None:
    """Nobody else would: while it is missing nothing is published, and nobody tells the replicator anything."""
    sender, _ = start(2)
    buffer = sender.publish(0, v(1))
    wait_until(lambda: buffer.acked == v(1), "acknowledged")
    for word in range(Word.ACKED, Word.ACKED + 3):
        buffer._words[word] ^= 1 << 17
        assert buffer.acked is None
        wait_until(lambda: buffer.acked == v(1), "acknowledged again")


def test_a_version_that_is_corrupt_here_is_not_sent_for_ever(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    sender, holder = start(2)
    sender.publish(0, v(1))
    wait_until(lambda: sender.acknowledged(0, v(1)), "acknowledged")
    slab = sender.slab(0)
    buffer = slab.buffers[1] if slab.buffers[0].id == v(1) else slab.buffers[0]
    buffer.begin(v(2), SIZE)
    buffer.seal_chunk(0, 1234)  # as if a bit had flipped right after it was sealed
    buffer.complete()
    sender.replicator.notify()
    wait_until(lambda: complete_ids(slab) == [v(1)], "it is dropped, so that all ranks can give it up")
    assert buffer.acked != v(2)
    assert complete_ids(holder.store.slab(0)) == [v(1)]
    assert "machine 0 drops its copy of version 2: shard of rank 0" in caplog.text


def test_a_corrupt_replica_is_replaced_in_the_next_generation(start: Start) -> None:
    sender, holder = start(2)
    sender.publish(0, v(1))
    wait_until(lambda: sender.acknowledged(0, v(1)), "acknowledged")
    replica = holder.store.complete_buffer(0, v(1))
    assert replica is not None
    replica.data[SIZE - 1] ^= 1
    for machine in (sender, holder):
        machine.store.enter_generation(2, 2, 1)
    introduce([sender, holder])
    wait_until(lambda: sound(holder, v(1)), "the replica is whole again")


def sound(holder: Replicating, version: VersionId) -> bool:
    buffer = holder.store.complete_buffer(0, version)
    return buffer is not None and content_or_none(buffer) == shard_bytes(0, version, SIZE)


def content_or_none(buffer: Buffer) -> bytes | None:
    try:
        return content_of(buffer)
    except IntegrityError:
        return None


# -- strangers -------------------------------------------------------------------------------------------------------


def test_strangers_and_broken_peers_are_named_once_and_disturb_nobody(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong secrets, other jobs, replayed and oversized frames, all the time, while good peers replicate."""
    sender, holder = start(2)
    address = holder.server.address
    hello = wire._HELLO.pack(b"LGGEMINI", wire.PROTOCOL, 0, wire._job_digest(JOB), bytes(32))
    with wire.connect(address, JOB, SECRET, 0, timeout_s=10.0) as honest:
        proof = honest.getsockname()  # whatever: an earlier proof is worth nothing to another nonce
    for number in range(1, 6):
        sender.publish(0, v(number))
        for job, secret in ((JOB, b"guessed"), ("another job", SECRET)):
            with pytest.raises(AuthenticationError):
                wire.connect(address, job, secret, 0, timeout_s=10.0)
        with socket.create_connection(address) as replayed, contextlib.suppress(ConnectionError):
            replayed.sendall(hello)
            replayed.recv(wire._PROOF.size, socket.MSG_WAITALL)
            replayed.sendall(repr(proof).encode().ljust(32)[:32])
            assert replayed.recv(1) == b""
        for frame in (
            Frame(Kind.BEGIN, 0, v(9), wire.MAX_SHARD_BYTES + 1),
            Frame(Kind.CHUNK, 0, v(9), 0, 0, 2**32 - 1),
        ):
            with wire.connect(address, JOB, SECRET, 7, timeout_s=10.0) as oversized, contextlib.suppress(OSError):
                wire.send(oversized, frame)
                assert oversized.recv(1) == b""
        wait_until(lambda number=number: sender.acknowledged(0, v(number)), "acknowledged")  # type: ignore[misc]
    wait_until(lambda: len(holder.server._connections) == 1, "only the good peer is connected")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message.split(":")[0] for message in sorted(warnings)] == [
        "ended a connection from machine 7 (127.0.0.1)",
        "refused a connection",
    ]


def test_a_push_from_long_ago_takes_no_room(start: Start) -> None:
    """Replayed, or from a peer that was stopped and goes on: what is older than all that is held is refused."""
    sender, holder = start(2)
    replicate_in_turn(sender, 5, 6)
    old = Buffer.create(0, SIZE)
    write_version(old, v(4), SIZE)
    transport = sender.transport_to(holder.peer)
    with pytest.raises(OSError, match="holds newer versions of rank 0 than 4"):
        transport.push(old, v(4), lambda: True)
    assert transport.push(sender.slab(0).buffers[1], v(6), lambda: True)  # twice is once
    assert complete_ids(holder.store.slab(0)) == [v(6), v(5)]
    transport.close()
    old.close()
