"""Frames and headers made up at random: nobody falls over, nothing is believed, memory is not taken for it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import header, wire
from lightning_gemini.dataplane.header import Word
from lightning_gemini.dataplane.slab import Buffer, BufferState
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import GeminiError, IntegrityError
from tests.dataplane.machines import JOB, SECRET, Machine, complete_ids, content_of, shard_bytes, write_version

OWNER, SIZE = 0, 3000
OLD, NEW = VersionId(1, 4), VersionId(1, 5)
MOST_MEMORY = 64 << 20
"""A made-up shard may be this large before its bytes come; more is refused or was never asked for."""


def number(noise: random.Random) -> int:
    """Small numbers, edges, and anything."""
    bits = noise.choice([1, 3, 8, 16, 40, 64])
    return noise.choice([0, 1, noise.getrandbits(bits), 2**bits - 1])


def version(noise: random.Random) -> VersionId:
    return noise.choice([OLD, NEW, VersionId(number(noise), min(number(noise), 2**64 - 2))])


def frame(noise: random.Random) -> Frame:
    """A frame whose checksum is right."""
    size = number(noise)
    return Frame(
        kind=noise.choice(list(Kind)),
        owner=noise.choice([OWNER, 1, number(noise) % 2**32]),
        id=version(noise),
        size=size if size < MOST_MEMORY or size > wire.MAX_SHARD_BYTES else SIZE,
        chunk_bytes=number(noise),
        length=noise.choice([0, 5, number(noise) % 2**32]),
        checksum=number(noise),
        sender_generation=noise.choice([1, 1, number(noise)]),
        kept=noise.choice([None, OLD, version(noise)]),
    )


def mutated(noise: random.Random, data: bytes) -> bytes:
    """The same with some bytes changed, lost, doubled or made up."""
    broken = bytearray(data)
    for _ in range(noise.randrange(3)):
        place = noise.randrange(len(broken) + 1)
        change = noise.randrange(4)
        if change == 0:
            broken[place : place + 1] = noise.randbytes(1)
        elif change == 1:
            del broken[place : place + noise.randrange(1, 40)]
        elif change == 2:
            broken[place:place] = broken[place : place + 40]
        else:
            broken[place:place] = noise.randbytes(noise.randrange(40))
    return bytes(broken)


def conversation(noise: random.Random) -> bytes:
    frames = [frame(noise) for _ in range(noise.randrange(1, 6))]
    if noise.random() < 0.5:
        frames.insert(0, Frame(Kind.BEGIN, OWNER, NEW, SIZE, 1 << 20, sender_generation=1, kept=OLD))
    parts = [one.pack() + noise.randbytes(min(one.length, 200)) for one in frames]
    return mutated(noise, b"".join(parts))


@pytest.fixture
def holder(caplog: pytest.LogCaptureFixture) -> Iterator[Machine]:
    """Machine 1, which holds the old version of rank 0."""
    caplog.set_level(logging.DEBUG)
    with Machine(1) as machine:
        target = machine.store.replica_target(OWNER, OLD, SIZE, 1)
        assert target is not None
        write_version(target, OLD, SIZE)
        yield machine
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_made_up_conversations_with_a_replica_server(
    holder: Machine, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    noise = random.Random(seed)
    for _ in range(150):
        with (
            contextlib.suppress(OSError),
            wire.connect(holder.server.address, JOB, SECRET, 0, timeout_s=10.0) as sock,
        ):
            sock.sendall(conversation(noise))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
    assert holder.store.wait_for_writers(10.0)
    slab = holder.store.slab(OWNER)
    assert slab is not None
    for buffer in slab.complete():  # a made-up version without a single chunk is whole
        assert buffer.id == OLD or buffer.data_bytes == 0
        buffer.verify()
    assert holder.store.total_bytes < 4 * MOST_MEMORY
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, "one peer is complained about once"
    with Machine(0) as owner:  # others are served as ever
        write_version(owner.store.own(OWNER, SIZE).buffers[0], VersionId(1, 2**40), SIZE)
        transport = owner.transport_to(holder.peer)
        assert transport.push(owner.store.own(OWNER, SIZE).buffers[0], VersionId(1, 2**40), lambda: True)
        transport.close()


class Babbler:
    """Authenticates every caller, and answers whatever it likes."""

    def __init__(self, noise: random.Random) -> None:
        self._noise = noise
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                with sock, contextlib.suppress(OSError, EOFError):
                    wire.accept(sock, JOB, SECRET, timeout_s=10.0)
                    asked = wire.receive(sock)
                    likely = Frame(Kind.BEGIN if asked.kind is Kind.FETCH else Kind.WANT, asked.owner, asked.id, SIZE)
                    if self._noise.random() < 0.5:
                        sock.sendall(likely.pack())
                    sock.sendall(conversation(self._noise))

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def test_made_up_answers_to_a_transport(seed: int) -> None:
    noise = random.Random(seed)
    server = Babbler(random.Random(seed + 1))
    with Machine(0) as owner:
        mine = owner.store.own(OWNER, SIZE).buffers[0]
        write_version(mine, NEW, SIZE)
        for _ in range(100):
            transport = TcpTransport(Peer(1, server.listener.getsockname()), JOB, SECRET, 0, 1)
            wanted = VersionId(2, noise.randrange(9))
            if noise.random() < 0.5:
                with pytest.raises((IntegrityError, OSError, GeminiError)):
                    transport.fetch(OWNER, wanted, owner.retrieval(OWNER, wanted))
            else:
                with contextlib.suppress(OSError):  # now and then it happens to say that it has this very version
                    transport.push(mine, NEW, lambda: True)
            transport.close()
        assert content_of(mine) == shard_bytes(OWNER, NEW, SIZE)
        assert complete_ids(owner.store.slab(OWNER)) == [NEW]
        assert owner.store.total_bytes < 4 * MOST_MEMORY
    server.close()


def test_made_up_headers(seed: int) -> None:
    noise = random.Random(seed)
    with Machine(1) as machine:
        buffer = machine.store.replica_target(OWNER, OLD, SIZE, 1)
        assert buffer is not None
        size = os.fstat(buffer.fd).st_size
        states = [BufferState.EMPTY, BufferState.WRITING, BufferState.COMPLETE]
        for _ in range(2000):
            header.write_owner(buffer._words, OWNER)
            write_version(buffer, OLD, SIZE)
            for word in noise.sample(range(Word.END), noise.choice([2, 5, Word.END])):
                buffer._words[word] = noise.choice(states) if word == Word.STATE else number(noise)
            examine(machine, buffer)
            assert os.fstat(buffer.fd).st_size == size
        write_version(buffer, NEW, SIZE)
        assert content_of(buffer) == shard_bytes(buffer.owner, NEW, SIZE)  # a buffer like any other


def examine(machine: Machine, buffer: Buffer) -> None:
    """Everything that a reader asks of a buffer: it answers, and what it says to be complete is what was written."""
    known = (buffer.acked, buffer.committed, buffer.progress, buffer.retrieved, buffer.chunks_ready, buffer.view)
    assert None not in known[2:]
    with contextlib.suppress(IntegrityError):
        buffer.verify()
        assert buffer.id == OLD
    for holding in machine.store.inventory().holdings:
        assert holding.id == OLD
        assert content_of(buffer) == shard_bytes(OWNER, OLD, SIZE)
    slab = machine.store.slab(OWNER)
    assert slab is not None
    assert slab.newest_started() is None or buffer.id == OLD
