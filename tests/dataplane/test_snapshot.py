"""The snapshotter: copies behind training's back, at the right moment, and never takes training down."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import capacity, shard
from lightning_gemini.dataplane.shard import SMALL_BYTES, Draft, Planner
from lightning_gemini.dataplane.slab import Buffer, BufferState, Slab
from lightning_gemini.dataplane.snapshot import Snapshot, Snapshotter, _Sealing
from lightning_gemini.errors import AgentError, CapacityError, IntegrityError, StateChangedError
from tests.dataplane.encoding import same
from tests.dataplane.machines import content_of
from tests.dataplane.waiting import wait_until

CPU = torch.device("cpu")
LARGE = SMALL_BYTES // 4 + 1  # float32 values of a tensor that is not cloned at once


class Gate:
    """Stands for the agent: counts the notices, and can hold the snapshot thread up before it copies."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.notices = 0
        self.error: Exception | None = None

    def notify(self) -> None:
        self.notices += 1
        assert self.open.wait(20.0)
        if self.error is not None:
            raise self.error


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def snapshotter(gate: Gate) -> Iterator[Snapshotter]:
    made = Snapshotter(gate.notify, CPU)
    made.start()
    yield made
    gate.open.set()
    made.close()
    made.close()


@pytest.fixture
def buffers() -> Iterator[tuple[Buffer, Buffer]]:
    pair = Slab.create(0, 200_000)
    yield pair.buffers
    pair.close()


Buffers = tuple[Buffer, Buffer]


def v(number: int) -> VersionId:
    return VersionId(1, number)


def state_in(buffer: Buffer) -> tuple[Any, Any]:
    return shard.read(memoryview(bytearray(content_of(buffer))))


def finished(snapshot: Snapshot) -> Snapshot:
    assert snapshot.wait(20.0)
    return snapshot


def draft(stable: Any, volatile: Any) -> Draft:
    return Planner().draft(lambda: stable, volatile)


def to(buffer: Buffer) -> Callable[[], Buffer]:
    return lambda: buffer


def broken_draft() -> Draft:
    """One that fails in the middle: the second tensor has no bytes to copy."""
    return draft([torch.ones(LARGE), torch.empty(10, device="meta")], None)


# -- copying -----------------------------------------------------------------------------------------------------------


def test_a_version_is_copied_and_announced_twice(snapshotter: Snapshotter, gate: Gate, buffers: Buffers) -> None:
    stable, volatile = {"weight": torch.rand(LARGE), "step": torch.tensor(3)}, {"random": torch.rand(5), "name": "x"}
    snapshot = finished(snapshotter.begin(v(1), draft(stable, volatile), to(buffers[0])))
    assert (snapshot.error, buffers[0].id, buffers[0].retrieved) == (None, v(1), False)
    assert same(state_in(buffers[0]), (stable, volatile))
    assert gate.notices == 2
    assert snapshot.copy_s > 0


dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
sizes = st.sampled_from([0, 1, 3, 100, 8191, 8192, 8193, 32768, 65536, 70000])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(dtypes, sizes), max_size=5))
def test_tensors_across_chunk_borders_arrive_whole(
    snapshotter: Snapshotter, buffers: Buffers, small_chunks: int, parts: list[tuple[torch.dtype, int]]
) -> None:
    state = [(torch.arange(size) % 101).to(dtype) for dtype, size in parts]
    snapshot = finished(snapshotter.begin(v(1), draft(state, state[:1]), to(buffers[0])))
    assert snapshot.error is None
    assert buffers[0].chunk_bytes == small_chunks
    assert same(state_in(buffers[0])[0], state)


def test_chunks_are_sealed_while_the_copy_goes_on(
    snapshotter: Snapshotter, buffers: Buffers, small_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    seal = Buffer.seal

    def watched_seal(self: Buffer, end_byte: int) -> None:
        seal(self, end_byte)
        seen.append(self.chunks_ready)

    monkeypatch.setattr(Buffer, "seal", watched_seal)
    state = [torch.zeros(small_chunks // 4) for _ in range(4)]
    finished(snapshotter.begin(v(1), draft(state, None), to(buffers[0])))
    assert sorted(seen) == seen
    assert {1, 2, 3} <= set(seen)


def test_the_calling_thread_goes_on_at_once(snapshotter: Snapshotter, gate: Gate, buffers: Buffers) -> None:
    gate.open.clear()
    snapshot = snapshotter.begin(v(1), draft([torch.ones(LARGE)], None), to(buffers[0]))
    assert not snapshot.done
    wait_until(lambda: gate.notices == 1, "the thread has begun")
    assert (buffers[0].id, buffers[0].state, buffers[0].chunks_ready) == (v(1), BufferState.WRITING, 0)
    assert not snapshot.wait(0.01)
    gate.open.set()
    assert finished(snapshot).done


class Happening:
    """Stands for an event of a device: happens when it is waited for, or when the test says so."""

    def __init__(self) -> None:
        self.has_happened, self.waits = False, 0

    def query(self) -> bool:
        return self.has_happened

    def synchronize(self) -> None:
        self.waits += 1
        self.has_happened = True


def test_chunks_are_sealed_behind_the_device_and_few_pieces_are_under_way(buffers: Buffers, small_chunks: int) -> None:
    buffer, size = buffers[0], 3 * small_chunks - 1000
    buffer.begin(v(1), size)
    buffer.data[:size] = bytes(range(250)) * (size // 250) + bytes(size % 250)
    events = [Happening() for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        sealing = _Sealing(buffer, pool)
        sealing.written(small_chunks, events[0])  # type: ignore[arg-type]
        sealing.advance(1)
        assert [event.waits for event in events] == [0, 0, 0], "one may be under way"
        assert buffer.chunks_ready == 0
        sealing.written(2 * small_chunks + 5, events[1])  # type: ignore[arg-type]
        sealing.advance(1)
        assert [event.waits for event in events] == [1, 0, 0]
        assert buffer.chunks_ready <= 1
        events[1].has_happened = True
        sealing.written(size, events[2])  # type: ignore[arg-type]
        sealing.advance(1)
        assert [event.waits for event in events] == [1, 0, 0], "nobody waits for what is there"
        assert buffer.chunks_ready <= 2
        sealing.finish()
    assert [event.waits for event in events] == [1, 0, 1]
    assert buffer.chunks_ready == 2, "the last one ends with the version"
    buffer.seal(size)
    buffer.complete()
    buffer.verify()


# -- when training may change the state --------------------------------------------------------------------------------


def test_training_waits_until_its_state_was_read(snapshotter: Snapshotter, gate: Gate, buffers: Buffers) -> None:
    gate.open.clear()
    snapshot = snapshotter.begin(v(1), draft([torch.ones(LARGE)], None), to(buffers[0]))
    stepping = threading.Event()

    def step() -> None:
        snapshot.wait_until_read()
        stepping.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not stepping.wait(0.05)
    gate.open.set()
    assert stepping.wait(20.0)
    thread.join()


def test_a_step_right_after_the_wait_never_shows_in_the_version(snapshotter: Snapshotter, buffers: Buffers) -> None:
    weight, counter = torch.zeros(20 * LARGE), torch.zeros(3)
    for step in range(1, 40):
        weight.fill_(step)
        counter.fill_(step)
        snapshot = snapshotter.begin(v(step), draft({"weight": weight}, counter), to(buffers[step % 2]))
        snapshot.wait_until_read()
        weight.fill_(-1)
        counter.fill_(-1)
        finished(snapshot)
        stable, volatile = state_in(buffers[step % 2])
        assert bool((stable["weight"] == step).all())
        assert bool((volatile == step).all())


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_is_reported_and_the_next_one_works(snapshotter: Snapshotter, buffers: Buffers) -> None:
    snapshotter_error = finished(snapshotter.begin(v(1), broken_draft(), to(buffers[0])))
    assert isinstance(snapshotter_error.error, (NotImplementedError, RuntimeError))
    snapshotter_error.wait_until_read()  # training does not hang
    assert buffers[0].id is None
    assert finished(snapshotter.begin(v(2), draft([torch.ones(3)], None), to(buffers[0]))).error is None
    assert buffers[0].id == v(2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_agent_that_went_away_fails_the_version_alone(
    snapshotter: Snapshotter, gate: Gate, buffers: Buffers, when: str
) -> None:
    gate.open.clear()
    if when == "before":
        gate.error = AgentError("the agent went away")
    snapshot = snapshotter.begin(v(1), draft([torch.ones(3)], None), to(buffers[0]))
    if when == "after":
        wait_until(lambda: gate.notices == 1, "the first notice")
        gate.error = AgentError("the agent went away")
    gate.open.set()
    assert isinstance(finished(snapshot).error, AgentError)
    assert buffers[0].id is None
    gate.error = None
    assert finished(snapshotter.begin(v(2), draft([torch.ones(3)], None), to(buffers[1]))).error is None


def test_a_version_that_is_given_up_while_it_is_copied_never_counts(
    snapshotter: Snapshotter, gate: Gate, buffers: Buffers
) -> None:
    gate.open.clear()
    snapshot = snapshotter.begin(v(1), draft([torch.ones(LARGE)], None), to(buffers[0]))
    wait_until(lambda: gate.notices == 1, "the thread has begun")
    buffers[0].drop()
    gate.open.set()
    assert isinstance(finished(snapshot).error, IntegrityError)
    assert buffers[0].id is None


def test_two_versions_are_never_mixed_in_one_buffer(snapshotter: Snapshotter, gate: Gate, buffers: Buffers) -> None:
    """All ranks gave version 1 up, and version 2 goes to the same buffer, while the thread is still at version 1."""
    gate.open.clear()
    first = snapshotter.begin(v(1), draft([torch.full((LARGE,), 1.0)], None), to(buffers[0]))
    wait_until(lambda: gate.notices == 1, "the thread is at version 1")
    buffers[0].drop()
    second = snapshotter.begin(v(2), draft([torch.full((LARGE,), 2.0)], None), to(buffers[0]))
    gate.open.set()
    finished(second)
    assert (first.done, first.error is None, second.error) == (True, False, None)
    assert bool((state_in(buffers[0])[0][0] == 2.0).all())


def test_a_state_that_was_another_one_costs_no_older_version(snapshotter: Snapshotter, buffers: Buffers) -> None:
    def read_stable() -> None:
        raise StateChangedError("another one")

    finished(snapshotter.begin(v(1), draft([torch.ones(3)], None), to(buffers[0])))
    snapshot = finished(snapshotter.begin(v(3), Planner().draft(read_stable, None), to(buffers[0])))
    assert isinstance(snapshot.error, StateChangedError)
    assert (buffers[0].id, buffers[0].state) == (v(1), BufferState.COMPLETE)


def test_memory_that_is_short_fails_the_version(
    snapshotter: Snapshotter, buffers: Buffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(snapshotter.begin(v(1), draft([torch.ones(3)], None), to(buffers[0])))
    monkeypatch.setattr(capacity, "available_bytes", lambda: 257 * 2**20)
    assert isinstance(
        finished(snapshotter.begin(v(2), draft([torch.ones(5_000_000)], None), to(buffers[1]))).error, CapacityError
    )
    assert (buffers[0].id, buffers[1].id) == (v(1), None)
    assert finished(snapshotter.begin(v(3), draft([torch.ones(3)], None), to(buffers[1]))).error is None


def test_a_deferred_action_that_fails_is_said_once_and_ends_nothing(
    snapshotter: Snapshotter, buffers: Buffers, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def fail() -> None:
        raise OSError("no space left on device")

    for _ in range(3):
        snapshotter.defer(fail)
    snapshotter.defer(done.set)
    assert finished(snapshotter.begin(v(1), draft([torch.ones(3)], None), to(buffers[0]))).error is None
    assert done.wait(20.0), "after the copy"
    assert caplog.text.count("no space left on device") == 1
    assert finished(snapshotter.begin(v(2), draft([torch.ones(3)], None), to(buffers[1]))).error is None


def test_what_was_deferred_is_done_before_the_end(buffers: Buffers) -> None:
    snapshotter = Snapshotter(lambda: None, CPU)
    snapshotter.start()
    done = threading.Event()
    snapshotter.defer(done.set)
    snapshotter.close()
    assert done.is_set()


def test_closing_finishes_what_was_begun(gate: Gate, buffers: Buffers) -> None:
    snapshotter = Snapshotter(gate.notify, CPU)
    snapshotter.start()
    snapshot = snapshotter.begin(v(1), draft([torch.ones(LARGE)], None), to(buffers[0]))
    snapshotter.close()
    assert snapshot.done
    assert state_in(buffers[0])[0][0].all()


# -- replicas ----------------------------------------------------------------------------------------------------------


def test_the_time_until_all_holders_have_it_is_noted(snapshotter: Snapshotter, buffers: Buffers) -> None:
    snapshot = finished(snapshotter.begin(v(1), draft([torch.ones(3)], None), to(buffers[0])))
    assert snapshot.replica_complete_s is None
    buffers[0].acknowledge(v(1), time.monotonic_ns())
    assert snapshot.replica_complete_s is not None
    assert snapshot.replica_complete_s >= snapshot.copy_s
    buffers[0].drop()
    finished(snapshotter.begin(v(2), draft([torch.ones(3)], None), to(buffers[0])))
    buffers[0].acknowledge(v(2), time.monotonic_ns())
    assert snapshot.replica_complete_s is None, "the buffer is another version's by now"


# -- the gate ----------------------------------------------------------------------------------------------------------


class Door:
    """A gate that counts how often it was asked."""

    def __init__(self) -> None:
        self.is_open, self.asked = False, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.is_open


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def guarded(gate: Gate, door: Door) -> Iterator[Snapshotter]:
    made = Snapshotter(gate.notify, CPU, door)
    made.start()
    yield made
    door.is_open = True
    made.close()


def test_a_closed_gate_holds_the_copy_up(guarded: Snapshotter, door: Door, buffers: Buffers) -> None:
    snapshot = guarded.begin(v(1), draft([torch.ones(LARGE)], None), to(buffers[0]))
    wait_until(lambda: door.asked > 3, "the gate is asked again and again")
    assert not snapshot.done
    assert buffers[0].chunks_ready == 0
    door.is_open = True
    assert finished(snapshot).error is None
    assert state_in(buffers[0])[0][0].all()


def test_training_that_waits_opens_every_gate(guarded: Snapshotter, door: Door, buffers: Buffers) -> None:
    weight = torch.ones(LARGE)
    snapshot = guarded.begin(v(1), draft([weight], None), to(buffers[0]))
    wait_until(lambda: door.asked > 1, "the gate is asked")
    snapshot.wait_until_read()
    weight.zero_()
    assert finished(snapshot).error is None
    assert not door.is_open
    assert state_in(buffers[0])[0][0].all()


def test_the_gate_is_asked_before_every_piece(
    guarded: Snapshotter, door: Door, buffers: Buffers, small_chunks: int
) -> None:
    door.is_open = True
    pieces = 5
    weight = torch.ones(pieces * small_chunks // 4)
    assert finished(guarded.begin(v(1), draft([weight], None), to(buffers[0]))).error is None
    assert door.asked == pieces


def test_a_gate_that_fails_ends_the_version_alone(gate: Gate, buffers: Buffers) -> None:
    def fail() -> bool:
        raise RuntimeError("the gate failed")

    snapshotter = Snapshotter(gate.notify, CPU, fail)
    snapshotter.start()
    snapshot = finished(snapshotter.begin(v(1), draft([torch.ones(LARGE)], None), to(buffers[0])))
    snapshotter.close()
    assert str(snapshot.error) == "the gate failed"
    assert buffers[0].id is None
