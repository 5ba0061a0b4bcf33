"""The wire: who gets in, what a frame is, and what random bytes, wrong lengths and silence lead to."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import AuthenticationError, ProtocolError
from tests.dataplane.machines import JOB, SECRET

SHORT_S = 0.4


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_TIMEOUT_S", SHORT_S)


class Door:
    """A port that runs the accepting side once, and remembers what came of it."""

    def __init__(self, job: str = JOB, secret: bytes = SECRET) -> None:
        self.job, self.secret = job, secret
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.machine: int | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._accept)
        self.thread.start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.listener.getsockname()
        return host, port

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        with sock:
            try:
                self.machine = wire.accept(sock, self.job, self.secret, timeout_s=5.0)
                sock.sendall(b"welcome")
            except (OSError, EOFError) as error:
                self.error = error

    def close(self) -> None:
        self.thread.join(10.0)
        assert not self.thread.is_alive()
        self.listener.close()


@pytest.fixture
def open_door() -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def make(job: str = JOB, secret: bytes = SECRET) -> Door:
        doors.append(Door(job, secret))
        return doors[-1]

    yield make
    for door in doors:
        door.close()


# -- handshake ---------------------------------------------------------------------------------------------------------


def test_two_agents_of_a_job_know_each_other(open_door: Callable[..., Door]) -> None:
    door = open_door()
    with wire.connect(door.address, JOB, SECRET, 3, timeout_s=5.0) as sock:
        assert sock.recv(7) == b"welcome"
        assert sock.gettimeout() == 5.0
    door.thread.join(10.0)
    assert (door.machine, door.error) == (3, None)


@pytest.mark.parametrize(("job", "secret"), [(JOB, b"guessed"), ("another", SECRET), ("another", b"guessed")])
def test_a_wrong_secret_or_job_is_refused_by_both_sides(
    open_door: Callable[..., Door], job: str, secret: bytes
) -> None:
    door = open_door()
    with pytest.raises(AuthenticationError):
        wire.connect(door.address, job, secret, 0, timeout_s=5.0)
    door.thread.join(10.0)
    assert door.machine is None
    assert isinstance(door.error, AuthenticationError)


def test_another_protocol_is_refused(open_door: Callable[..., Door], monkeypatch: pytest.MonkeyPatch) -> None:
    hello = wire._HELLO.pack(b"LGGEMINI", wire.PROTOCOL + 1, 0, wire._job_digest(JOB), bytes(32))
    door = open_door()
    with socket.create_connection(door.address) as sock:
        sock.sendall(hello)
        assert sock.recv(1) == b""  # not a byte of proof for a stranger
    door.thread.join(10.0)
    assert "not an agent of this version" in str(door.error)


def test_the_proof_cannot_be_mirrored(open_door: Callable[..., Door]) -> None:
    """Who does not know the secret cannot answer with the server's own proof, nor with that of an earlier visit."""
    door = open_door()
    with socket.create_connection(door.address) as sock:
        sock.sendall(wire._HELLO.pack(b"LGGEMINI", wire.PROTOCOL, 0, wire._job_digest(JOB), bytes(32)))
        _, proof = wire._PROOF.unpack(sock.recv(wire._PROOF.size, socket.MSG_WAITALL))
        sock.sendall(proof)
        assert sock.recv(7) == b""
    door.thread.join(10.0)
    assert "does not know this job's secret" in str(door.error)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("said", [b"", b"LGGEMINI", b"GET / HTTP/1.1\r\n"], ids=["nothing", "magic", "http"])
def test_who_falls_silent_is_hung_up_on(open_door: Callable[..., Door], said: bytes) -> None:
    door = open_door()
    with socket.create_connection(door.address) as sock:
        sock.sendall(said)
        door.thread.join(10.0)
    assert isinstance(door.error, AuthenticationError)


@pytest.mark.usefixtures("impatient")
def test_who_says_a_byte_now_and_then_is_hung_up_on_too(open_door: Callable[..., Door]) -> None:
    door = open_door()
    began = time.monotonic()
    with socket.create_connection(door.address) as sock, contextlib.suppress(OSError):
        while door.thread.is_alive() and time.monotonic() - began < 10.0:
            sock.sendall(b"L")
            door.thread.join(SHORT_S / 4)
    assert isinstance(door.error, AuthenticationError)
    assert time.monotonic() - began < 5 * SHORT_S + 2.0


def test_random_bytes_instead_of_a_hello_get_nobody_in(open_door: Callable[..., Door], seed: int) -> None:
    noise = random.Random(seed)
    for _ in range(20):
        door = open_door()
        with socket.create_connection(door.address) as sock, contextlib.suppress(OSError):
            sock.sendall(noise.randbytes(noise.randrange(200)))
            sock.shutdown(socket.SHUT_WR)
            assert b"welcome" not in sock.recv(1000)
        door.thread.join(10.0)
        assert isinstance(door.error, OSError)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("answer", [b"", b"220 smtp ready\r\n", bytes(64)], ids=["nothing", "smtp", "zeros"])
def test_a_server_that_is_no_agent_is_left(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(answer)
                sock.recv(1000)
                with contextlib.suppress(OSError):
                    sock.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        began = time.monotonic()
        with pytest.raises(AuthenticationError):
            wire.connect(address, JOB, SECRET, 0, timeout_s=5.0)
        assert time.monotonic() - began < SHORT_S + 5.0
        thread.join(10.0)


def test_nobody_there_is_an_ordinary_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ConnectionRefusedError):
        wire.connect(address, JOB, SECRET, 0, timeout_s=5.0)


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    one.settimeout(5.0)
    other.settimeout(5.0)
    with one, other:
        yield one, other


Pair = tuple[socket.socket, socket.socket]
word = st.integers(0, 2**64 - 1)
versions = st.builds(VersionId, word, st.integers(0, 2**64 - 2))
frames = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    owner=st.integers(0, 2**32 - 1),
    id=versions,
    size=st.integers(0, wire.MAX_SHARD_BYTES),
    chunk_bytes=st.integers(0, wire.MAX_CHUNK_BYTES),
    length=st.integers(0, wire.MAX_REASON_BYTES),
    checksum=word,
    sender_generation=word,
    kept=st.none() | versions,
)


@given(frame=frames)
def test_a_frame_arrives_as_it_was_sent(frame: Frame) -> None:
    one, other = socket.socketpair()
    with one, other:
        wire.send(one, frame)
        assert wire.receive(other) == frame


def test_a_payload_follows_its_frame_however_large(pair: Pair, seed: int) -> None:
    payload = random.Random(seed).randbytes(3_000_001)  # more than the socket takes at once
    sent = Frame(Kind.CHUNK, 1, VersionId(1, 2), length=len(payload))
    thread = threading.Thread(target=lambda: wire.send(pair[0], sent, memoryview(payload)))
    thread.start()
    frame = wire.receive(pair[1])
    received = bytearray(frame.length)
    wire.receive_into(pair[1], memoryview(received))
    thread.join(10.0)
    assert received == payload


def test_a_frame_that_is_cut_is_no_frame() -> None:
    whole = Frame(Kind.BEGIN, 1, VersionId(1, 2)).pack()
    for length in range(len(whole)):
        one, other = socket.socketpair()
        with other:
            with one:
                one.sendall(whole[:length])
            with pytest.raises(EOFError if length == 0 else ConnectionError):
                wire.receive(other)


@settings(max_examples=200)
@given(noise=st.binary(min_size=1, max_size=150), real=st.booleans())
def test_random_bytes_are_no_frame(noise: bytes, real: bool) -> None:
    data = wire._FRAME_MAGIC + noise if real else noise
    one, other = socket.socketpair()
    with other:
        with one:
            one.sendall(data)
        try:
            frame = wire.receive(other)
        except (ProtocolError, ConnectionError):
            return
        assert data.startswith(wire._FRAME_MAGIC)
        assert frame.length <= wire.MAX_CHUNK_BYTES
        assert frame.size <= wire.MAX_SHARD_BYTES


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.CHUNK, length=wire.MAX_CHUNK_BYTES + 1),
        Frame(Kind.REFUSE, length=wire.MAX_REASON_BYTES + 1),
        Frame(Kind.BEGIN, length=2**32 - 1),
        Frame(Kind.BEGIN, size=wire.MAX_SHARD_BYTES + 1),
        Frame(Kind.BEGIN, chunk_bytes=2**64 - 1),
        Frame(Kind.FETCH, size=2**64 - 1),
    ],
    ids=lambda frame: f"{frame.kind.name}",
)
def test_a_length_beyond_its_cap_is_refused_before_anything_is_allocated(pair: Pair, frame: Frame) -> None:
    pair[0].sendall(frame.pack())
    with pytest.raises(ProtocolError, match="more than is allowed"):
        wire.receive(pair[1])


def test_an_unknown_kind_is_refused(pair: Pair) -> None:
    raw = bytearray(Frame(Kind.BEGIN).pack())[:-8]
    struct.pack_into("<B", raw, 4, 77)
    pair[0].sendall(raw + struct.pack("<Q", xxhash.xxh3_64_intdigest(raw)))
    with pytest.raises(ProtocolError, match="kind 77, which is no frame"):
        wire.receive(pair[1])


def test_a_reason_is_cut_to_its_cap_and_read_whatever_it_is(pair: Pair) -> None:
    wire.refuse(pair[0], 4, VersionId(1, 2), "é" * 10_000)
    frame = wire.receive(pair[1])
    assert (frame.kind, frame.owner, frame.length) == (Kind.REFUSE, 4, wire.MAX_REASON_BYTES)
    assert wire.receive_reason(pair[1], frame).startswith("ééé")
