"""One flipped byte, anywhere: in a slab at rest, in one that is being written, on the wire. It is noticed, or harmless.

Harmless means: the owner, the version, its bytes and what the inventory says of it are as they were, and what peers
acknowledged, what is committed and how far the owner is are as they were or unknown, never something else.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import xxhash

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.header import CHUNK_SLOTS, Word
from lightning_gemini.dataplane.slab import HEADER_BYTES, Buffer, BufferState, Slab
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import IntegrityError
from tests.dataplane.machines import JOB, SECRET, Machine, complete_ids, content_of, shard_bytes, write_version
from tests.dataplane.waiting import wait_until

OWNER, SIZE = 1, 1500
OLD, NEW = VersionId(1, 7), VersionId(1, 8)
TABLE = 4096
HEADER = range(8 * Word.END)
MASKS = (*(1 << bit for bit in range(8)), 0xFF, 0x55)
Observed = tuple[Any, ...]


@pytest.fixture
def store() -> Iterator[ShardStore]:
    made = ShardStore(0)
    made.enter_generation(1, 2, 1)
    made.set_replication(2, "mixed")
    yield made
    made.clear()


@pytest.fixture
def buffer(store: ShardStore) -> Buffer:
    """A peer's replica, with all that is ever noted in it."""
    made = store.replica_target(OWNER, NEW, SIZE, 1)
    assert made is not None
    write_version(made, NEW, SIZE)
    made.acknowledge(NEW)
    made.note_committed(OLD)
    made.report_progress(9)
    return made


@contextlib.contextmanager
def flipped(buffer: Buffer, place: int, mask: int) -> Iterator[None]:
    raw = memoryview(buffer._mapping)
    before = bytes(raw[: HEADER_BYTES + SIZE])
    raw[place] ^= mask
    yield
    raw[: HEADER_BYTES + SIZE] = before


def facts(store: ShardStore, buffer: Buffer) -> Observed:
    holdings = [(holding.owner, holding.id, holding.retrieved) for holding in store.inventory().holdings]
    return holdings, buffer.owner, buffer.id, buffer.retrieved


def notes(buffer: Buffer) -> Observed:
    return buffer.acked, buffer.committed, buffer.progress


def assert_noticed_or_harmless(store: ShardStore, buffer: Buffer, before: Observed, noted: Observed) -> None:
    try:
        content = content_of(buffer)
    except IntegrityError:
        assert not store.inventory().holdings or buffer.id == NEW  # damaged bytes are found by who reads them
        assert buffer.id in (NEW, None)
    else:
        assert content == shard_bytes(OWNER, NEW, SIZE)
        assert facts(store, buffer) == before
    assert buffer.owner == OWNER
    assert all(now in (then, None) for now, then in zip(notes(buffer), noted, strict=True))
    assert buffer.progress == 9  # written twice


# -- at rest -----------------------------------------------------------------------------------------------------------


def test_every_byte_of_a_complete_buffers_header(store: ShardStore, buffer: Buffer) -> None:
    before, noted, noticed = facts(store, buffer), notes(buffer), 0
    for place in HEADER:
        for mask in MASKS:
            with flipped(buffer, place, mask):
                assert_noticed_or_harmless(store, buffer, before, noted)
                noticed += buffer.id is None
    assert noticed == 8 * len(MASKS) * 9  # magic, state, four of identity, chunks, both checksums
    assert facts(store, buffer) == before


def test_every_byte_of_the_used_checksum_table_and_of_the_data(store: ShardStore, buffer: Buffer) -> None:
    for place in (*range(TABLE, TABLE + 8 * buffer.chunks), *range(HEADER_BYTES, HEADER_BYTES + SIZE)):
        with flipped(buffer, place, 1 << place % 8), pytest.raises(IntegrityError, match="corrupt"):
            buffer.verify()
    buffer.verify()


def test_every_byte_that_nobody_uses(store: ShardStore, buffer: Buffer) -> None:
    before, noted = facts(store, buffer), notes(buffer)
    raw = memoryview(buffer._mapping)
    for first, last in ((HEADER.stop, TABLE), (TABLE + 8 * buffer.chunks, TABLE + 8 * CHUNK_SLOTS)):
        for place in range(first, last):
            raw[place] ^= 0xFF
        assert_noticed_or_harmless(store, buffer, before, noted)
        assert (facts(store, buffer), notes(buffer)) == (before, noted)


def test_no_flip_brings_a_dropped_version_back(store: ShardStore, buffer: Buffer) -> None:
    buffer.drop()
    for place in HEADER:
        for mask in range(1, 256) if place // 8 == Word.STATE else MASKS:
            with flipped(buffer, place, mask):
                assert (buffer.state, buffer.id, store.inventory().holdings) == (BufferState.EMPTY, None, ())


def test_no_flip_makes_an_unfinished_version_count(store: ShardStore, buffer: Buffer) -> None:
    write_version(buffer, NEW, SIZE, until_byte=SIZE)  # every byte is there, but nobody said that it is complete
    for place in HEADER:
        for mask in range(1, 256) if place // 8 == Word.STATE else MASKS:
            with flipped(buffer, place, mask):
                assert buffer.state is not BufferState.COMPLETE
                assert buffer.id in (NEW, None)
                assert not store.inventory().holdings


def test_a_damaged_header_is_repaired_by_the_next_version(store: ShardStore, buffer: Buffer) -> None:
    for place in HEADER:
        with flipped(buffer, place, 0x81):
            write_version(buffer, VersionId(1, 9), SIZE)
            assert content_of(buffer) == shard_bytes(OWNER, VersionId(1, 9), SIZE)


def test_a_slab_does_not_offer_what_is_damaged(buffer: Buffer) -> None:
    other = Buffer.create(OWNER, SIZE)
    write_version(other, OLD, SIZE)
    slab = Slab(buffer, other)
    assert complete_ids(slab) == [NEW, OLD]
    with flipped(buffer, 8 * Word.VERSION, 0xFF):
        assert complete_ids(slab) == [OLD]
        assert slab.newest_started() is other
        assert slab.holding(NEW) is None
        assert [view.complete for view in slab.views] == [False, True]
    other.close()


# -- while it is written -----------------------------------------------------------------------------------------------


def test_every_byte_of_the_header_while_the_version_is_written(store: ShardStore, buffer: Buffer) -> None:
    """Whoever completes it afterwards fails, or what is complete is right, or is known to be wrong."""
    for place in HEADER:
        for mask in MASKS:
            with flipped(buffer, place, mask):
                memoryview(buffer._mapping)[place] ^= mask
                write_version(buffer, NEW, SIZE, until_byte=0)
                memoryview(buffer._mapping)[place] ^= mask
                with contextlib.suppress(IntegrityError):
                    buffer.seal(SIZE)
                    buffer.complete()
                    assert (content_of(buffer), buffer.id) == (shard_bytes(OWNER, NEW, SIZE), NEW)


def test_chunks_of_the_version_before_are_never_taken_for_the_next_one() -> None:
    """A flip says that all chunks are ready; bytes and checksums of the version before would have fitted."""
    with Machine(1) as holder, Machine(0) as sender:
        own = sender.store.own(0, SIZE).buffers[0]
        write_version(own, OLD, SIZE)
        own.begin(NEW, SIZE)
        own._words[Word.CHUNKS_READY] = own.chunks
        transport = sender.transport_to(holder.peer)
        with pytest.raises(OSError):  # noqa: PT011 - the peer hangs up
            transport.push(own, NEW, lambda: True)
        transport.close()
        wait_until(lambda: holder.store.slab(0) is not None, "the push began")
        assert not complete_ids(holder.store.slab(0))


# -- on the wire -------------------------------------------------------------------------------------------------------

RANK = 0  # of machine 0, which sends to machine 1
PAYLOAD = shard_bytes(RANK, NEW, 120)
BEGIN = Frame(Kind.BEGIN, RANK, NEW, len(PAYLOAD), 1 << 20, sender_generation=1, kept=OLD)
CHUNK = Frame(Kind.CHUNK, RANK, NEW, 0, 0, len(PAYLOAD), xxhash.xxh3_64_intdigest(PAYLOAD))
END = Frame(Kind.END, RANK, NEW)
STREAM = BEGIN.pack() + CHUNK.pack() + PAYLOAD + END.pack()


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


@pytest.fixture
def holder() -> Iterator[Machine]:
    """Machine 1, which holds an older version of rank 0 and must go on holding it."""
    with Machine(1) as machine:
        target = machine.store.replica_target(RANK, OLD, SIZE, 1)
        assert target is not None
        write_version(target, OLD, SIZE)
        yield machine
        kept = machine.store.complete_buffer(RANK, OLD)
        assert kept is not None
        assert content_of(kept) == shard_bytes(RANK, OLD, SIZE)


def answers(sock: socket.socket) -> list[Kind]:
    """What the server says until it falls silent or hangs up."""
    said = []
    with contextlib.suppress(OSError, EOFError):
        while True:
            frame = wire.receive(sock)
            if frame.kind is Kind.REFUSE:
                wire.receive_reason(sock, frame)
            said.append(frame.kind)
    return said


def pushed(holder: Machine, stream: bytes) -> list[Kind]:
    with holder.store.writer(RANK):
        pass  # nothing is being received any more
    with wire.connect(holder.server.address, JOB, SECRET, 0, timeout_s=10.0) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(stream)
            sock.shutdown(socket.SHUT_WR)
        return answers(sock)


def test_every_byte_of_a_push(holder: Machine) -> None:
    for place in range(len(STREAM)):
        assert Kind.ACK not in pushed(holder, flip(STREAM, place)), f"byte {place} of {len(STREAM)}"
        assert complete_ids(holder.store.slab(RANK)) == [OLD]
    assert pushed(holder, STREAM) == [Kind.WANT, Kind.ACK]
    assert complete_ids(holder.store.slab(RANK)) == [NEW, OLD]


def test_every_byte_of_a_handshake(holder: Machine) -> None:
    hello = wire._HELLO.pack(b"LGGEMINI", wire.PROTOCOL, 0, wire._job_digest(JOB), bytes(32))
    for place in range(len(hello) + 32):
        with socket.create_connection(holder.server.address) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(flip(hello, place) if place < len(hello) else hello)
            answer = sock.recv(wire._PROOF.size, socket.MSG_WAITALL)
            if len(answer) < wire._PROOF.size:
                continue  # refused at once
            proof = wire._proof(SECRET, b"client", bytes(32), answer[:32], 0)
            sock.sendall(proof if place < len(hello) else flip(proof, place - len(hello)))
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    holder.server.disconnect()
    wait_until(lambda: not holder.server._connections, "nobody is connected")


class ShortServer:
    """Authenticates every caller, and answers its one question with the bytes that it was given."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answer = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                with sock, contextlib.suppress(OSError, EOFError):
                    wire.accept(sock, JOB, SECRET, timeout_s=10.0)
                    wire.receive(sock)
                    sock.sendall(self.answer)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(65536):
                        pass

    def transport(self) -> TcpTransport:
        return TcpTransport(Peer(1, self.listener.getsockname()), JOB, SECRET, 0, 1)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def server() -> Iterator[ShortServer]:
    made = ShortServer()
    yield made
    made.close()


def test_every_byte_of_an_answer_to_a_fetch(server: ShortServer) -> None:
    with Machine(0) as owner:
        for place in range(len(STREAM)):
            server.answer = flip(STREAM, place)
            transport = server.transport()
            with pytest.raises((IntegrityError, OSError)):
                transport.fetch(RANK, NEW, owner.retrieval(RANK, NEW))
            transport.close()
            assert not owner.store.inventory().holdings
        server.answer = STREAM
        transport = server.transport()
        assert transport.fetch(RANK, NEW, owner.retrieval(RANK, NEW)) == len(PAYLOAD)
        transport.close()
        back = owner.store.complete_buffer(RANK, NEW)
        assert back is not None
        assert content_of(back) == PAYLOAD


@pytest.mark.parametrize("said", [(Kind.HAVE,), (Kind.WANT, Kind.ACK)], ids=["have", "want and ack"])
def test_every_byte_of_an_answer_to_a_push(server: ShortServer, said: tuple[Kind, ...]) -> None:
    """Nothing is taken for an acknowledgement that is none."""
    right = b"".join(Frame(kind, RANK, NEW).pack() for kind in said)
    own = Buffer.create(RANK, SIZE)
    write_version(own, NEW, SIZE)
    for place in range(len(right)):
        server.answer = flip(right, place)
        transport = server.transport()
        with pytest.raises(OSError):  # noqa: PT011 - any kind
            transport.push(own, NEW, lambda: True)
        transport.close()
    server.answer = right
    transport = server.transport()
    assert transport.push(own, NEW, lambda: True)
    transport.close()
    own.close()


def test_every_byte_of_a_refusal() -> None:
    one, other = socket.socketpair()
    with one, other:
        wire.refuse(one, RANK, NEW, "is in generation 2, the sender in 1")
        whole = other.recv(1000)
        for place in range(len(whole)):
            one.sendall(flip(whole, place))
            with pytest.raises(OSError):  # noqa: PT011 - any kind
                wire.receive_reason(other, wire.receive(other))
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                other.recv(1000)
            other.setblocking(True)


def test_two_machines_never_take_one_for_the_other(seed: int) -> None:
    """The machine's rank in the handshake is covered by the proof."""
    noise = random.Random(seed)
    one, other = noise.sample(range(1000), 2)
    nonces = noise.randbytes(32), noise.randbytes(32)
    assert wire._proof(SECRET, b"client", *nonces, one) != wire._proof(SECRET, b"client", *nonces, other)
