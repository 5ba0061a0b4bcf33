"""Worker to worker: pieces through sub-buffers, credits, pacing, and peers that speak out of turn."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import pacer
from lightning_gemini.dataplane.pace_page import Pace, PacePage
from lightning_gemini.dataplane.pacer import Pacer
from lightning_gemini.dataplane.slab import Buffer, chunk_bytes_for
from lightning_gemini.dataplane.transport.p2p import BUFFERS, GOODBYE
from lightning_gemini.dataplane.transport.pair import HOLDER, SOURCE, Pair
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import ProtocolError
from tests.dataplane.machines import complete_ids, content_of, shard_bytes, write_version
from tests.dataplane.rigs import P2pRig, open_pair
from tests.dataplane.waiting import wait_until

OWNER = 0
CHUNK = chunk_bytes_for(1)
SIZE = 2 * CHUNK + 1000
OLD, NEW = VersionId(1, 4), VersionId(1, 5)
GENEROUS_S = 3600.0  # a span of which no test reaches the end


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    made = Buffer.create(OWNER, SIZE)
    yield made
    made.close()


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., P2pRig]]:
    made: list[P2pRig] = []

    def make(*arguments: int) -> P2pRig:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(P2pRig(directory, *arguments))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


MakeRig = Callable[..., P2pRig]


def always() -> bool:
    return True


def assert_arrived(rig: P2pRig, version: VersionId, size: int = SIZE) -> None:
    kept = rig.holder.store.complete_buffer(OWNER, version)
    assert kept is not None
    assert content_of(kept) == shard_bytes(OWNER, version, size)


@pytest.mark.parametrize("sub_buffers", [1, 2, 3, 4])
def test_every_byte_arrives_through_any_number_of_sub_buffers(
    make_rig: MakeRig, buffer: Buffer, sub_buffers: int
) -> None:
    for number, piece in enumerate((100_003, CHUNK // 2, CHUNK, CHUNK + 1, 3 * CHUNK), start=1):
        rig = make_rig(sub_buffers, sub_buffers * piece)
        transport = rig.connect()
        for step in (1, 2):  # the second time through buffers that are there
            version = VersionId(number, step)
            rig.holder.store.enter_generation(number, 2, 1)
            transport._generation = number
            write_version(buffer, version, SIZE)
            assert transport.push(buffer, version, always)
            assert_arrived(rig, version)
        (receiver,) = rig.receivers
        assert receiver.sub_buffers.peak_bytes == sub_buffers * min(piece, SIZE)
        transport.close()


# -- by the plan -------------------------------------------------------------------------------------------------------


class Paced:
    """A push that obeys a page."""

    def __init__(
        self,
        rig: P2pRig,
        buffer: Buffer,
        *,
        chunk: int,
        window: int,
        one_chunk: bool = False,
        usable_s: float = GENEROUS_S,
    ) -> None:
        self.rig, self.buffer, self.page = rig, buffer, PacePage.private()
        self.page.set_plan(
            [usable_s, usable_s],
            bandwidth_bytes_per_s=1e9,
            startup_s=0.0,
            chunk_bytes=chunk,
            window_bytes=window,
            one_chunk=one_chunk,
        )
        self.page.set_pace(Pace.PACED)
        self.page.open_span(0)
        self.page.close_span()
        self.transport = rig.connect()

    def push(self) -> bool:
        return self.transport.push(self.buffer, NEW, always, None, Pacer(self.page))

    @property
    def arrived(self) -> int:
        slab = self.rig.holder.store.slab(OWNER)
        found = [one.chunks_ready for one in slab.buffers if one.id == NEW] if slab else []
        return max(found, default=-1)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_nothing_travels_while_training_uses_the_network(
    make_rig: MakeRig, buffer: Buffer, threads: ThreadPoolExecutor
) -> None:
    paced = Paced(make_rig(), buffer, chunk=100_003, window=4 * 100_003)
    write_version(buffer, NEW, SIZE, until_byte=CHUNK)
    pushing = threads.submit(paced.push)
    wait_until(lambda: paced.arrived == 0, "the holder waits for the first piece")
    assert paced.page.sent == 0
    paced.page.open_span(0)
    wait_until(lambda: paced.arrived == 1, "a chunk arrives in the span")
    paced.page.close_span()
    buffer.seal(SIZE)
    buffer.complete()
    assert paced.page.sent == CHUNK
    paced.page.open_span(1)
    assert pushing.result(20.0)
    assert 0 < paced.page.take_peak() <= 4 * 100_003
    assert_arrived(paced.rig, NEW)


def test_the_rest_goes_at_once_when_training_waits(
    make_rig: MakeRig, buffer: Buffer, threads: ThreadPoolExecutor
) -> None:
    paced = Paced(make_rig(), buffer, chunk=100_003, window=4 * 100_003)
    write_version(buffer, NEW, SIZE)
    pushing = threads.submit(paced.push)
    wait_until(lambda: paced.arrived == 0, "the holder waits for the first piece")
    paced.page.rush(True)
    assert pushing.result(20.0)
    assert_arrived(paced.rig, NEW)


def test_a_span_that_never_opens_does_not_hold_a_version_back(
    make_rig: MakeRig, buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training does something else, or nothing: there is no step whose rush would end it."""
    monkeypatch.setattr(pacer, "_PATIENCE_NS", 100_000_000)
    paced = Paced(make_rig(), buffer, chunk=100_003, window=4 * 100_003, usable_s=0.01)
    write_version(buffer, NEW, SIZE)
    assert paced.push()
    assert_arrived(paced.rig, NEW)


def test_without_a_pipeline_one_piece_is_on_its_way(make_rig: MakeRig, buffer: Buffer) -> None:
    paced = Paced(make_rig(), buffer, chunk=300_001, window=300_001)
    write_version(buffer, NEW, SIZE)
    paced.page.open_span(0)
    assert paced.push()
    assert_arrived(paced.rig, NEW)
    assert paced.page.take_peak() == 300_001
    assert paced.rig.receivers[0].sub_buffers.peak_bytes == 300_001


def test_a_span_with_one_piece_needs_a_sub_buffer_as_large(make_rig: MakeRig, buffer: Buffer) -> None:
    paced = Paced(make_rig(), buffer, chunk=1000, window=1000, one_chunk=True)
    write_version(buffer, NEW, SIZE)
    paced.page.open_span(0)
    assert paced.push()
    assert_arrived(paced.rig, NEW)
    assert paced.page.take_peak() == SIZE
    assert paced.rig.receivers[0].sub_buffers.peak_bytes == SIZE


# -- out of turn -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(make_rig: MakeRig) -> Iterator[tuple[P2pRig, Pair]]:
    """A worker that says what it likes to a holder that has the old version."""
    rig = make_rig()
    own = Buffer.create(OWNER, SIZE)
    transport = rig.connect()
    write_version(own, OLD, SIZE)
    assert transport.push(own, OLD, always)
    transport.close()
    own.close()
    pair = open_pair(rig._receive(), SOURCE)
    yield rig, pair
    pair.break_off()
    rig.close()
    assert complete_ids(rig.holder.store.slab(OWNER)) == []  # closed
    assert not rig.holder.store.slabs()


def begin(pair: Pair, sub_buffers: int = 2, piece: int = CHUNK) -> None:
    frame = Frame(Kind.BEGIN, OWNER, NEW, SIZE, chunk_bytes_for(SIZE), sender_generation=1)
    pair.send(frame, BUFFERS.pack(sub_buffers, piece))


def piece(offset: int, size: int, **fields: object) -> tuple[Frame, bytes]:
    frame = Frame(Kind.CHUNK, OWNER, NEW, offset, size)
    return frame, struct.pack("<Q", 7) * ((offset + size) // CHUNK - offset // CHUNK)


WRONG: dict[str, Callable[[], list[tuple[Frame, bytes]]]] = {
    "a piece that leaves a gap": lambda: [piece(100, 100)],
    "a piece twice": lambda: [piece(0, 100), piece(0, 100)],
    "an empty piece": lambda: [piece(0, 0)],
    "a piece beyond the end": lambda: [(Frame(Kind.CHUNK, OWNER, NEW, 0, SIZE + 1), struct.pack("<3Q", 1, 2, 3))],
    "too few checksums": lambda: [(Frame(Kind.CHUNK, OWNER, NEW, 0, CHUNK), b"")],
    "too many checksums": lambda: [(Frame(Kind.CHUNK, OWNER, NEW, 0, 100), b"12345678")],
    "a piece of another rank": lambda: [(Frame(Kind.CHUNK, 9, NEW, 0, 100), b"")],
    "a piece of another version": lambda: [(Frame(Kind.CHUNK, OWNER, OLD, 0, 100), b"")],
    "a second beginning": lambda: [(Frame(Kind.BEGIN, OWNER, NEW, SIZE, CHUNK), BUFFERS.pack(2, CHUNK))],
    "a goodbye in the middle": lambda: [(GOODBYE, b"")],
    "an answer": lambda: [(Frame(Kind.ACK, OWNER, NEW), b"")],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_source_out_of_turn_is_hung_up_on_and_nothing_counts(source: tuple[P2pRig, Pair], wrong: str) -> None:
    rig, pair = source
    begin(pair)
    assert pair.receive()[0].kind is Kind.WANT
    sending = []  # gloo forgets what nobody waits for
    with contextlib.suppress(ConnectionError):
        for frame, payload in WRONG[wrong]():
            pair.send(frame, payload)
            if frame.kind is Kind.CHUNK:
                sending.append(pair.send_bytes(torch.zeros(frame.chunk_bytes, dtype=torch.uint8)))
    assert _answers(pair) in ([], [Kind.WANT])  # credit for what was right, then it hangs up
    _assert_only_old(rig)


def _answers(pair: Pair) -> list[Kind]:
    answers: list[Kind] = []
    with contextlib.suppress(ConnectionError):
        while len(answers) < 10:
            answers.append(pair.receive()[0].kind)
    return answers


def _assert_only_old(rig: P2pRig) -> None:
    slab = rig.holder.store.slab(OWNER)
    assert slab is not None
    wait_until(lambda: [one.id for one in slab.buffers if one.id] == [OLD], "the torn version is dropped")
    assert_arrived(rig, OLD)


@pytest.mark.parametrize(("sub_buffers", "size"), [(0, 100), (5000, 100), (1, 1 << 40)])
def test_absurd_buffers_are_refused(source: tuple[P2pRig, Pair], sub_buffers: int, size: int) -> None:
    rig, pair = source
    begin(pair, sub_buffers, size)
    with pytest.raises(ConnectionError):
        pair.receive()
    _assert_only_old(rig)


def test_an_end_that_came_too_early_is_refused_and_the_next_version_is_taken(source: tuple[P2pRig, Pair]) -> None:
    rig, pair = source
    begin(pair)
    assert pair.receive()[0].kind is Kind.WANT
    pair.send(Frame(Kind.END, OWNER, NEW))
    frame, reason = pair.receive()
    assert frame.kind is Kind.REFUSE
    assert b"0 of 3 chunks" in reason
    _assert_only_old(rig)
    begin(pair)
    assert pair.receive()[0].kind is Kind.WANT
    pair.send(Frame(Kind.ABORT, OWNER, NEW))
    assert pair.receive()[0].kind is Kind.ABORT
    pair.send(GOODBYE)
    assert pair.receive()[0] == GOODBYE


# -- the pair ----------------------------------------------------------------------------------------------------------


def test_breaking_off_wakes_both_ends(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    ends = list(threads.map(lambda rank: open_pair(tmp_path / "pair", rank), (SOURCE, HOLDER)))
    waiting = [threads.submit(end.receive) for end in ends]
    ends[0].break_off()
    ends[0].break_off()
    for end in waiting:
        with pytest.raises(ConnectionError):
            end.result(10.0)


@pytest.mark.parametrize("size", [0, 1, 400, 512, 4000])
def test_a_payload_of_any_length_comes_with_its_frame(tmp_path: Path, threads: ThreadPoolExecutor, size: int) -> None:
    source, holder = threads.map(lambda rank: open_pair(tmp_path / "pair", rank), (SOURCE, HOLDER))
    payload = shard_bytes(OWNER, NEW, size)
    for number in range(50):
        source.send(Frame(Kind.REFUSE, number, NEW), payload)
        frame, received = holder.receive()
        assert (frame.owner, received) == (number, payload)
    source.break_off()
    holder.break_off()


def test_a_damaged_payload_is_noticed(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    ends = list(threads.map(lambda rank: open_pair(tmp_path / "pair", rank), (SOURCE, HOLDER)))
    reading = threads.submit(ends[1].receive)
    ends[0]._post((Frame(Kind.REFUSE, OWNER, NEW, length=3, checksum=77).pack() + b"why").ljust(512), 1)
    with pytest.raises(ProtocolError, match="damaged"):
        reading.result(10.0)
    for end in ends:
        end.break_off()


def test_waiting_for_a_peer_ends_when_nobody_wants_it(tmp_path: Path) -> None:
    wanted = threading.Event()
    store = dist.FileStore(str(tmp_path / "pair"), 2)
    with pytest.raises(ConnectionAbortedError):
        Pair.open(store, SOURCE, torch.device("cpu"), timeout_s=60.0, wanted=wanted.is_set)
