"""Workers that replicate by themselves, with real agents: when they take over from TCP, and when they give it back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.callbacks import peer_exchange
from lightning_gemini.callbacks.peer_exchange import PeerExchange
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer
from tests.callbacks.test_peer_memory import Cluster, v
from tests.controlplane.agents import ShortDirectory
from tests.dataplane.machines import content_of, shard_bytes
from tests.dataplane.waiting import wait_until

SIZE = 50_000


class Worker:
    """One rank with its exchange."""

    def __init__(self, cluster: Cluster, rank: int, store: Path) -> None:
        self.rank, self._cluster = rank, cluster
        cluster.memories[rank].generation = cluster.generation
        self.slab = cluster.memories[rank].client.attach(SIZE)
        config = CheckpointConfig(replicas=cluster.replicas, transport="p2p", buffer_bytes=4 * 7001)
        shared = dist.FileStore(str(store), -1)
        self.exchange = PeerExchange(cluster.memories[rank], self.slab, torch.device("cpu"), config, 0, shared)

    def publish(self, number: int) -> Buffer:
        newest = self.slab.newest_started()
        buffer = self.slab.buffers[1] if newest is self.slab.buffers[0] else self.slab.buffers[0]
        buffer.begin(v(number), SIZE)
        self._notify()
        buffer.data[:SIZE] = shard_bytes(self.rank, v(number), SIZE)
        buffer.seal(SIZE)
        buffer.complete()
        self._notify()
        return buffer

    def _notify(self) -> None:
        self._cluster.memories[self.rank].client.notify()
        self.exchange.notify()

    def commit(self, number: int) -> None:
        buffer = self.publish(number)
        wait_until(lambda: buffer.acked == v(number), f"version {number} of rank {self.rank} is acknowledged")
        for holder in self._cluster.memories[0].placement.holders(self.rank)[1:]:
            assert content_of(self._cluster.copy(self.rank, holder, v(number))) == shard_bytes(
                self.rank, v(number), SIZE
            )
        self.slab.note_committed(v(number))

    def until_working(self) -> None:
        wait_until(lambda: self.exchange.working, f"rank {self.rank} has met its holders")
        assert self.slab.pace.held


Workers = Callable[..., list[Worker]]


@pytest.fixture
def workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Workers]:
    caplog.set_level(logging.WARNING)
    directory = ShortDirectory()
    made: list[Worker] = []
    clusters: list[Cluster] = []

    def make(machines: int = 2, replicas: int = 2) -> list[Worker]:
        clusters.append(Cluster(directory.path, machines, replicas))
        made.extend(Worker(clusters[-1], rank, tmp_path / "store") for rank in range(machines))
        return made

    yield make
    closing = [threading.Thread(target=worker.exchange.close) for worker in made]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(20.0)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("p2p")]
    for worker in made:
        assert not worker.slab.pace.held
        worker.slab.close()
    for cluster in clusters:
        cluster.close()
    directory.remove()


def start(workers: list[Worker]) -> list[Worker]:
    for worker in workers:
        worker.exchange.start()
    for worker in workers:
        worker.until_working()
    return workers


@pytest.mark.parametrize(("machines", "replicas"), [(2, 2), (3, 2), (3, 3)])
def test_versions_travel_from_worker_to_worker(workers: Workers, machines: int, replicas: int) -> None:
    ranks = start(workers(machines, replicas))
    for number in range(6, 10):
        for worker in ranks:
            worker.commit(number)
    assert all(0 < worker.exchange.peak_buffer_bytes <= (machines - 1) * 4 * 7001 for worker in ranks)


def test_a_rank_that_failed_does_not_wait_for_the_others(workers: Workers) -> None:
    first, second = start(workers())
    first.commit(6)
    began = time.monotonic()
    first.exchange.close(orderly=False)
    assert time.monotonic() - began < peer_exchange._CLOSE_S, "as long as an orderly end may take"
    assert not first.slab.pace.held
    first.commit(7)
    second.commit(6)
    assert not second.exchange.working


def test_tcp_serves_until_all_have_met(workers: Workers) -> None:
    first, second = workers()
    first.exchange.start()
    first.commit(6)
    assert not first.exchange.working
    assert not first.slab.pace.held
    second.exchange.start()
    first.until_working()
    first.commit(7)
    assert second.exchange.peak_buffer_bytes > 0


def test_tcp_takes_over_when_the_connection_breaks(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    first, second = start(workers())
    first.commit(6)
    second.exchange._receiving[0].close()
    first.commit(7)
    wait_until(lambda: not first.slab.pace.held, "the agent may send")
    assert not first.exchange.working
    first.commit(8)
    second.commit(6)
    assert second.exchange.working
    assert len([record for record in caplog.records if "travel over tcp" in record.getMessage()]) == 1


def test_tcp_takes_over_when_the_holder_refuses_for_long(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_exchange, "_PATIENCE_S", 0.5)
    first, second = start(workers())
    busy = second._cluster.agents[1]._store.writer(0)
    with busy:
        buffer = first.publish(6)
        wait_until(lambda: not first.slab.pace.held, "the agent may send")
    wait_until(lambda: buffer.acked == v(6), "the agent has sent it")


def test_a_short_refusal_changes_nothing(workers: Workers) -> None:
    first, second = start(workers())
    with second._cluster.agents[1]._store.writer(0):
        buffer = first.publish(6)
        time.sleep(0.3)  # in which it is refused once or twice
        assert buffer.acked != v(6)
    wait_until(lambda: buffer.acked == v(6), "it is sent after all")
    assert first.exchange.working


def test_a_copy_that_is_damaged_at_home_is_dropped_and_the_next_one_travels(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = start(workers())
    first.commit(6)
    buffer = first.slab.buffers[0] if first.slab.newest_started() is first.slab.buffers[1] else first.slab.buffers[1]
    buffer.begin(v(7), SIZE)
    buffer.seal_chunk(0, 1234)
    buffer.complete()
    first._notify()
    wait_until(lambda: buffer.id is None, "the damaged copy is dropped")
    assert any("drops its copy of version 7" in record.getMessage() for record in caplog.records)
    first.commit(8)
    assert first.exchange.working


def test_what_an_older_note_undid_is_noted_again(workers: Workers) -> None:
    """The agent's own push of an older version may end after the worker's of a newer one."""
    first, _ = start(workers())
    first.commit(6)
    agent = first._cluster.agents[0]
    buffer = first.slab.newest_started()
    assert buffer is not None
    agent._replicator._held[0, 1] = VersionId(1, 5)
    buffer.forget_peers()
    wait_until(lambda: buffer.acked == v(6), "it is acknowledged again")
