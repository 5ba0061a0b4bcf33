"""The TCP protocol against peers that speak out of turn: each ends its own connection, and harms nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import xxhash

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.slab import Buffer, chunk_bytes_for
from lightning_gemini.dataplane.transport import Peer, TcpTransport, chunk_stream
from lightning_gemini.dataplane.transport.replica_server import ReplicaServer
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import IntegrityError, ProtocolError
from tests.dataplane.machines import JOB, SECRET, Machine, complete_ids, content_of, shard_bytes, write_version
from tests.dataplane.waiting import wait_until

OWNER = 0
OLD, NEW = VersionId(1, 4), VersionId(1, 5)
CHUNK = chunk_bytes_for(1)
SIZE = 2 * CHUNK + 100


@pytest.fixture
def holder(caplog: pytest.LogCaptureFixture) -> Iterator[Machine]:
    """Machine 1, which holds the old version of rank 0 and must go on holding it."""
    caplog.set_level(logging.DEBUG)
    with Machine(1) as machine:
        write_version(target(machine, OLD), OLD, SIZE)
        yield machine
        kept = machine.store.complete_buffer(OWNER, OLD)
        assert kept is not None
        assert content_of(kept) == shard_bytes(OWNER, OLD, SIZE)
        assert_serves(machine)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def target(machine: Machine, version: VersionId) -> Buffer:
    buffer = machine.store.replica_target(OWNER, version, SIZE, 1)
    assert buffer is not None
    return buffer


def assert_serves(machine: Machine) -> None:
    with Machine(0) as owner:
        transport = owner.transport_to(machine.peer)
        assert transport.fetch(OWNER, OLD, owner.retrieval(OWNER, OLD)) == SIZE
        transport.close()


@pytest.fixture
def caller(holder: Machine) -> Iterator[socket.socket]:
    """An authenticated connection to the holder."""
    with wire.connect(holder.server.address, JOB, SECRET, 0, timeout_s=10.0) as sock:
        yield sock


def begin(sock: socket.socket, size: int = SIZE) -> None:
    wire.send(sock, Frame(Kind.BEGIN, OWNER, NEW, size, chunk_bytes_for(size), sender_generation=1))
    assert wire.receive(sock).kind is Kind.WANT


def chunk(index: int, *, size: int = SIZE) -> tuple[Frame, bytes]:
    content = shard_bytes(OWNER, NEW, size)[index * CHUNK : (index + 1) * CHUNK]
    return Frame(Kind.CHUNK, OWNER, NEW, index, 0, len(content), xxhash.xxh3_64_intdigest(content)), content


def assert_hung_up(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):  # whatever we still send may meet a closed door
        assert sock.recv(1) == b""


def assert_nothing_new(holder: Machine) -> None:
    assert complete_ids(holder.store.slab(OWNER)) == [OLD]
    slab = holder.store.slab(OWNER)
    assert slab is not None
    wait_until(lambda: [buffer.id for buffer in slab.buffers if buffer.id] == [OLD], "the torn version is dropped")


def replace(pair: tuple[Frame, bytes], **fields: object) -> tuple[Frame, bytes]:
    return dataclasses.replace(pair[0], **fields), pair[1]  # type: ignore[arg-type]


WRONG_STREAMS: dict[str, Callable[[], list[tuple[Frame, bytes]]]] = {
    "reordered": lambda: [chunk(1), chunk(0)],
    "duplicated": lambda: [chunk(0), chunk(0)],
    "skipped": lambda: [chunk(0), chunk(2)],
    "beyond the end": lambda: [chunk(0), chunk(1), chunk(2), replace(chunk(2), size=3)],
    "too short": lambda: [(Frame(Kind.CHUNK, OWNER, NEW, 0, 0, 10), b"0123456789")],
    "without bytes": lambda: [(Frame(Kind.CHUNK, OWNER, NEW, 0, 0, 0), b"")],
    "of another shard": lambda: [replace(chunk(0), owner=9)],
    "of another version": lambda: [replace(chunk(0), id=VersionId(1, 6))],
    "of another generation": lambda: [replace(chunk(0), id=VersionId(2, NEW.version))],
    "with a wrong checksum": lambda: [replace(chunk(0), checksum=7)],
    "ended early": lambda: [chunk(0), (Frame(Kind.END, OWNER, NEW), b"")],
    "ended for another version": lambda: [chunk(0), chunk(1), chunk(2), (Frame(Kind.END, OWNER, VersionId(1, 6)), b"")],
    "ended at once": lambda: [(Frame(Kind.END, OWNER, NEW), b"")],
    "begun again": lambda: [chunk(0), (Frame(Kind.BEGIN, OWNER, NEW, SIZE, CHUNK, sender_generation=1), b"")],
    "answered by itself": lambda: [(Frame(Kind.ACK, OWNER, NEW), b"")],
}


@pytest.mark.parametrize("stream", WRONG_STREAMS)
def test_a_wrong_stream_ends_its_connection_and_nothing_counts(
    holder: Machine, caller: socket.socket, stream: str
) -> None:
    begin(caller)
    with contextlib.suppress(ConnectionError):
        for frame, payload in WRONG_STREAMS[stream]():
            wire.send(caller, frame, payload)
    assert_hung_up(caller)
    assert_nothing_new(holder)


def test_a_right_stream_is_acknowledged(holder: Machine, caller: socket.socket) -> None:
    begin(caller)
    for index in range(3):
        wire.send(caller, *chunk(index))
    wire.send(caller, Frame(Kind.END, OWNER, NEW))
    assert wire.receive(caller).kind is Kind.ACK
    assert complete_ids(holder.store.slab(OWNER)) == [NEW, OLD]


def test_an_aborted_stream_may_be_followed_by_another(holder: Machine, caller: socket.socket) -> None:
    begin(caller)
    wire.send(caller, *chunk(0))
    wire.send(caller, Frame(Kind.ABORT, OWNER, NEW))
    begin(caller)
    assert complete_ids(holder.store.slab(OWNER)) == [OLD]


@pytest.mark.parametrize("length", [1, 40, CHUNK // 2, CHUNK + 3])
def test_a_stream_that_is_cut_counts_for_nothing(holder: Machine, length: int) -> None:
    """At a frame's first byte, inside it, inside its payload, and inside the next frame."""
    whole = b"".join(frame.pack() + payload for frame, payload in (chunk(0), chunk(1)))
    with wire.connect(holder.server.address, JOB, SECRET, 0, timeout_s=10.0) as sock:
        begin(sock)
        sock.sendall(whole[: len(chunk(0)[0].pack()) + length if length > CHUNK else length])
    assert_nothing_new(holder)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.CHUNK, OWNER, NEW),
        Frame(Kind.END, OWNER, NEW),
        Frame(Kind.WANT),
        Frame(Kind.REFUSE),
        Frame(Kind.BEGIN, OWNER, NEW, wire.MAX_SHARD_BYTES + 1, sender_generation=1),
        Frame(Kind.CHUNK, OWNER, NEW, 0, 0, 2**32 - 1),
    ],
    ids=["chunk", "end", "want", "refuse", "huge shard", "huge chunk"],
)
def test_a_frame_out_of_turn_ends_the_connection(holder: Machine, caller: socket.socket, frame: Frame) -> None:
    wire.send(caller, frame)
    assert_hung_up(caller)
    assert_nothing_new(holder)


def test_a_shard_that_no_machine_can_hold_is_refused(holder: Machine, caller: socket.socket) -> None:
    """It must not come to the kernel, which would kill somebody to make room."""
    wire.send(caller, Frame(Kind.BEGIN, OWNER, NEW, wire.MAX_SHARD_BYTES, CHUNK, sender_generation=1))
    answer = wire.receive(caller)
    assert answer.kind is Kind.REFUSE
    assert "cannot allocate" in wire.receive_reason(caller, answer)
    assert complete_ids(holder.store.slab(OWNER)) == [OLD]
    wire.send(caller, Frame(Kind.FETCH, OWNER, OLD))
    assert wire.receive(caller).kind is Kind.BEGIN  # the conversation goes on


def test_random_bytes_from_an_authenticated_peer_harm_nobody(holder: Machine, seed: int) -> None:
    noise = random.Random(seed)
    for _ in range(25):
        caller = wire.connect(holder.server.address, JOB, SECRET, 0, timeout_s=10.0)
        with caller, contextlib.suppress(ConnectionError):
            if noise.random() < 0.5:  # refused while the one before it is still being torn down
                wire.send(caller, Frame(Kind.BEGIN, OWNER, NEW, SIZE, CHUNK, sender_generation=1))
                assert wire.receive(caller).kind in (Kind.WANT, Kind.REFUSE)
            for _ in range(noise.randrange(4)):
                caller.sendall(noise.choice([chunk(0)[0].pack(), wire._FRAME_MAGIC, b""]))
                caller.sendall(noise.randbytes(noise.randrange(2000)))
    assert_nothing_new(holder)


def test_random_bytes_from_strangers_harm_nobody(holder: Machine, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    noise = random.Random(seed)
    for _ in range(25):
        with socket.create_connection(holder.server.address) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(noise.randbytes(noise.randrange(500)))
    with socket.create_connection(holder.server.address) as last:  # accepted after all others, and refused for certain
        last.sendall(bytes(wire._HELLO.size))
        assert last.recv(1) == b""
    wait_until(lambda: not holder.server._connections, "all of them are gone")
    refusals = [record for record in caplog.records if "refused a connection" in record.message]
    assert len(refusals) == 1  # a port scanner does not fill the log


def test_a_sender_may_be_silent_for_longer_than_an_answer_may_take(
    holder: Machine, caller: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have to wait for its turn on the network, also in the middle of a chunk."""
    monkeypatch.setattr(chunk_stream, "IO_TIMEOUT_S", 0.05)
    begin(caller)
    header, content = chunk(0)[0].pack(), chunk(0)[1]
    caller.sendall(header + content[:1000])
    caller.settimeout(0.3)
    with pytest.raises(TimeoutError):
        caller.recv(1)  # nobody hangs up
    caller.settimeout(10.0)
    caller.sendall(content[1000:])
    for index in (1, 2):
        wire.send(caller, *chunk(index))
    wire.send(caller, Frame(Kind.END, OWNER, NEW))
    assert wire.receive(caller).kind is Kind.ACK
    assert complete_ids(holder.store.slab(OWNER)) == [NEW, OLD]


def test_a_connection_ends_with_the_machine_at_its_other_end(holder: Machine, caller: socket.socket) -> None:
    """However long it is silent: the kernel asks the other one whether it is still there."""
    wait_until(lambda: holder.server._connections, "the server knows the connection")
    (accepted,) = holder.server._connections
    begin(caller)
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle_s, between_s, times = (accepted.getsockopt(socket.IPPROTO_TCP, option) for option in options)
    assert idle_s + between_s * times == wire.DEAD_AFTER_S


def test_a_probe_is_answered_and_leaves_nothing_behind(holder: Machine, caller: socket.socket) -> None:
    for size in (0, 1, 300_000):
        began_ns = time.monotonic_ns()
        wire.send(caller, Frame(Kind.PROBE, length=size), bytes(size))
        assert wire.receive(caller) == Frame(Kind.ACK, length=8)
        clock = bytearray(8)
        wire.receive_into(caller, memoryview(clock))
        assert began_ns <= int.from_bytes(clock, "little") <= time.monotonic_ns()
    assert_serves(holder)


def test_a_probe_beyond_the_cap_is_refused(holder: Machine, caller: socket.socket) -> None:
    caller.sendall(Frame(Kind.PROBE, length=wire.MAX_PROBE_BYTES + 1).pack())
    assert_hung_up(caller)


def test_idle_and_silent_connections_do_not_keep_others_out(holder: Machine) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(holder.server.address))
        assert_serves(holder)


def test_a_closed_server_drops_everybody_and_lets_nobody_in(holder: Machine) -> None:
    with Machine(1) as other:
        address = other.server.address
        with wire.connect(address, JOB, SECRET, 0, timeout_s=10.0) as sock:
            other.server.close()
            other.server.close()
            assert sock.recv(1) == b""
        with pytest.raises(OSError):  # noqa: PT011 - refused or reset
            wire.connect(address, JOB, SECRET, 0, timeout_s=10.0)


def test_a_new_secret_counts_for_new_connections() -> None:
    with Machine(1) as machine:
        machine.server.set_secret(b"another")
        with pytest.raises(OSError, match=r"closed or silent|does not know"):
            wire.connect(machine.server.address, JOB, SECRET, 0, timeout_s=10.0)
        wire.connect(machine.server.address, JOB, b"another", 0, timeout_s=10.0).close()


def test_an_interface_that_is_not_there_is_an_error() -> None:
    with Machine(1) as machine, pytest.raises(OSError):  # noqa: PT011 - whatever the system says
        ReplicaServer("192.0.2.1", JOB, SECRET, machine.store).start()


# -- the client against servers that answer wrongly --------------------------------------------------------------------


def test_a_buffer_that_is_overwritten_at_the_last_moment_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk may already be of the next version, with a checksum that fits it."""
    with Machine(0) as owner, monkeypatch.context() as patched:
        buffer = owner.store.own(OWNER, SIZE).buffers[0]
        write_version(buffer, OLD, SIZE)
        sent = []

        def overwriting_send(sock: socket.socket, frame: Frame, payload: memoryview) -> None:
            sent.append(frame.size)
            if len(sent) == 3:
                write_version(buffer, NEW, SIZE)

        patched.setattr(wire, "send", overwriting_send)
        with socket.socket() as nowhere:
            assert not chunk_stream.send_chunks(nowhere, buffer, OLD, lambda: True)
        assert sent == [0, 1, 2]


class FakeServer:
    """Authenticates, then plays the frames it was given, whatever it is asked."""

    def __init__(self, *frames: tuple[Frame, bytes]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve, args=(frames,))
        self.thread.start()

    def _serve(self, frames: tuple[tuple[Frame, bytes], ...]) -> None:
        sock, _ = self.listener.accept()
        with sock, contextlib.suppress(OSError, EOFError):
            wire.accept(sock, JOB, SECRET, timeout_s=10.0)
            wire.receive(sock)
            for frame, payload in frames:
                wire.send(sock, frame, payload)

    def transport(self) -> TcpTransport:
        return TcpTransport(Peer(1, self.listener.getsockname()), JOB, SECRET, 0, 1)

    def close(self) -> None:
        self.thread.join(10.0)
        self.listener.close()


BEGIN = (Frame(Kind.BEGIN, OWNER, NEW, SIZE, CHUNK), b"")
END = (Frame(Kind.END, OWNER, NEW), b"")
WRONG_ANSWERS: dict[str, tuple[list[tuple[Frame, bytes]], type[Exception]]] = {
    "nothing": ([], ConnectionError),
    "nothing after the beginning": ([BEGIN], ConnectionError),
    "nothing after a chunk": ([BEGIN, chunk(0)], ConnectionError),
    "nothing where the end should be": ([BEGIN, chunk(0), chunk(1), chunk(2)], ConnectionError),
    "an end too early": ([BEGIN, chunk(0), END], IntegrityError),
    "another shard": ([replace(BEGIN, owner=3)], ProtocolError),
    "another version": ([replace(BEGIN, id=OLD)], ProtocolError),
    "an answer to another question": ([(Frame(Kind.ACK, OWNER, NEW), b"")], ProtocolError),
    "chunks in another order": ([BEGIN, chunk(1)], ProtocolError),
    "a corrupt chunk": ([BEGIN, replace(chunk(0), checksum=1)], IntegrityError),
    "an abort": ([BEGIN, chunk(0), (Frame(Kind.ABORT, OWNER, NEW), b"")], ProtocolError),
    "a refusal": ([(Frame(Kind.REFUSE, OWNER, NEW, length=6), b"sorry!")], ProtocolError),
}


@pytest.mark.parametrize("answer", WRONG_ANSWERS)
def test_a_wrong_answer_to_a_fetch_leaves_nothing_complete(answer: str) -> None:
    frames, expected = WRONG_ANSWERS[answer]
    server = FakeServer(*frames)
    with Machine(0) as owner:
        transport = server.transport()
        with pytest.raises(expected):
            transport.fetch(OWNER, NEW, owner.retrieval(OWNER, NEW))
        transport.close()
        assert not owner.store.inventory().holdings
    server.close()


@pytest.mark.parametrize("kind", [Kind.ACK, Kind.FETCH, Kind.BEGIN, Kind.END])
def test_a_wrong_answer_to_a_push_is_no_success(kind: Kind) -> None:
    server = FakeServer((Frame(kind, OWNER, NEW), b""))
    with Machine(0) as owner:
        buffer = owner.store.own(OWNER, SIZE).buffers[0]
        write_version(buffer, NEW, SIZE)
        transport = server.transport()
        with pytest.raises(ProtocolError, match=f"answered {kind.name}"):
            transport.push(buffer, NEW, lambda: True)
        transport.close()
    server.close()


def test_a_push_without_an_acknowledgement_is_no_success() -> None:
    server = FakeServer((Frame(Kind.WANT, OWNER, NEW), b""))
    with Machine(0) as owner:
        buffer = owner.store.own(OWNER, 100).buffers[0]
        write_version(buffer, NEW, 100)
        transport = server.transport()
        with pytest.raises(ConnectionError):
            transport.push(buffer, NEW, lambda: True)
        transport.close()
    server.close()
