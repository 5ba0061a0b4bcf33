"""Snapshots of state on a CUDA device, whose copies wait for the device and never for the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane import snapshot as snapshot_module
from lightning_gemini.dataplane.shard import Draft, Planner
from lightning_gemini.dataplane.slab import Buffer, Slab
from lightning_gemini.dataplane.snapshot import Snapshot, Snapshotter
from tests.dataplane.encoding import same
from tests.dataplane.machines import content_of

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
SLEEP_CYCLES = 400_000_000  # some tenths of a second


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab.create(0, 40 * MIB)
    yield made
    made.close()


@pytest.fixture
def snapshotter(device: torch.device) -> Iterator[Snapshotter]:
    made = Snapshotter(lambda: None, device)
    made.start()
    yield made
    made.close()


def take(snapshotter: Snapshotter, number: int, stable: Any, volatile: Any, buffer: Buffer) -> Snapshot:
    draft: Draft = Planner().draft(lambda: stable, volatile)
    return snapshotter.begin(VersionId(1, number), draft, lambda: buffer)


def state_in(buffer: Buffer, device: torch.device | None = None) -> tuple[Any, Any]:
    return shard.read(memoryview(bytearray(content_of(buffer))), device)


def on_host(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {name: on_host(part) for name, part in state.items()}
    return [on_host(part) for part in state] if isinstance(state, list) else state


def test_tensors_of_every_kind_arrive_whole(
    snapshotter: Snapshotter, slab: Slab, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_module, "_DEVICE_PIECE_BYTES", 3 * MIB + 4)
    stable = {
        "large": torch.randn(5 * MIB + 3, device=device),  # several pieces, none of which ends with a chunk
        "half": torch.randn(MIB + 1, device=device).bfloat16(),
        "transposed": torch.randn(300, 200, device=device).t(),
        "scalar": torch.tensor(3.5, device=device),
        "empty": torch.empty(0, device=device),
        "host": [torch.randn(5000), torch.tensor(7), "text"],
    }
    volatile = {"seen": torch.tensor(5, device=device), "running": torch.randn(1000, device=device)}
    snapshot = take(snapshotter, 1, stable, volatile, slab.buffers[0])
    assert snapshot.wait(60)
    assert snapshot.error is None
    assert same(state_in(slab.buffers[0]), (on_host(stable), on_host(volatile)))
    stable_again, _ = state_in(slab.buffers[0], device)
    assert stable_again["large"].device == device
    assert torch.equal(stable_again["large"], stable["large"])


def test_a_version_has_what_the_device_had_and_the_step_after_it_waits(
    snapshotter: Snapshotter, slab: Slab, device: torch.device
) -> None:
    snapshotter.prepare(slab.buffers)
    weight, counter = torch.zeros(8 * MIB, device=device), torch.zeros(3, device=device)
    for step in range(1, 6):
        torch.cuda._sleep(SLEEP_CYCLES)  # the step before is not through when the version is taken
        weight.fill_(step)
        counter.fill_(step)
        buffer = slab.buffers[step % 2]
        snapshot = take(snapshotter, step, {"weight": weight}, counter, buffer)
        counter.fill_(-1)  # a forward pass may do that at once
        snapshot.wait_until_read()
        weight.fill_(-1)
        assert not torch.cuda.current_stream().query(), "the host waited for the device"
        assert snapshot.wait(60)
        assert snapshot.error is None
        stable, volatile = state_in(buffer)
        assert bool((stable["weight"] == step).all())
        assert bool((volatile == step).all())


def test_no_chunk_is_ready_before_its_bytes_are_there(
    snapshotter: Snapshotter, slab: Slab, device: torch.device
) -> None:
    snapshotter.prepare(slab.buffers)
    for number in (1, 2):
        weight = torch.full((8 * MIB,), float(number), device=device)
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        snapshot = take(snapshotter, number, {"weight": weight}, None, slab.buffers[0])
        snapshot.wait_until_read()  # all copies are queued behind the sleep
        asleep = not torch.cuda.current_stream().query()
        ready = slab.buffers[0].chunks_ready
        assert ready == 0 or not asleep
        assert snapshot.wait(60)
        assert slab.buffers[0].chunks_ready == slab.buffers[0].chunks > 30
        assert asleep, "copies were queued while the device slept"
