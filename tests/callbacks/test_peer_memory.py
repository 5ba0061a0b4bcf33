"""Restores from corrupted memory, with real agents of several machines: what is used instead, and what is said."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gemini.callbacks.peer_memory import PeerMemory, RestoredShard
from lightning_gemini.callbacks.ranks import RankIdentity
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.controlplane.agent import MachineAgent
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.core.recovery import Tier, VersionId
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.header import Word
from lightning_gemini.dataplane.link_speed import Quantity
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.transport import TcpTransport
from lightning_gemini.errors import IntegrityError, RestoreError
from tests.controlplane.agents import JOB, ShortDirectory, introduce, make_agent
from tests.dataplane.encoding import encode
from tests.dataplane.waiting import wait_until

SIZE = 20_000


def v(number: int, generation: int = 1) -> VersionId:
    return VersionId(generation, number)


class Ranks:
    """Collectives of ranks that are threads."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=30.0)
        self._values: list[Any] = [None] * count

    def of(self, rank: int) -> _Group:
        return _Group(self, rank)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class _Group:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.gather(self._rank, value)

    def barrier(self) -> None:
        self.gather(None)


class Cluster:
    """Machines with one rank each, which hold versions 4 and 5 of every shard on ``replicas`` machines."""

    def __init__(self, directory: Path, machines: int, replicas: int) -> None:
        self._directory, self.machines, self.replicas = directory, machines, replicas
        self.generation = 1
        self.agents = [self._start(machine) for machine in range(machines)]
        introduce(self.agents)
        self.memories = self._connect()
        for number in (4, 5):
            for rank in range(machines):
                self.publish(rank, v(number))

    def _start(self, machine: int) -> MachineAgent:
        agent = make_agent(self._directory, machine)
        agent.start()
        return agent

    def _connect(self) -> list[PeerMemory]:
        ranks, made = Ranks(self.machines), []
        config = CheckpointConfig(replicas=self.replicas)
        for rank in range(self.machines):
            identity = RankIdentity(rank, 0, rank, 1, self.machines)
            memory = PeerMemory(config, identity, ranks.of(rank))  # type: ignore[arg-type]
            memory._client = AgentClient(self.agents[rank].settings.socket_path, JOB)
            memory._join()
            made.append(memory)
        return made

    def publish(self, rank: int, version: VersionId) -> None:
        memory = self.memories[rank]
        slab = memory.client.attach(SIZE)
        content = encode(shard.lay_out({"weights": weights(rank, version)}, {"step": version.version}))
        buffer = slab.buffers[version.version % 2]
        buffer.begin(version, len(content))
        buffer.data[: len(content)] = content
        buffer.seal(len(content))
        buffer.complete()
        memory.client.notify()
        wait_until(lambda: buffer.acked == version, f"version {version} of rank {rank} is acknowledged")
        slab.close()

    def lose(self, machine: int) -> None:
        """The machine is gone with its memory; an empty one takes its place."""
        self.memories[machine].client.close()
        self.agents[machine].close()
        self.agents[machine] = self._start(machine)

    def restart(self) -> None:
        """The workers start anew, in the next generation."""
        for memory in self.memories:
            memory.client.close()
        self.generation += 1
        introduce(self.agents, self.generation)
        self.memories = self._connect()

    def copy(self, owner: int, machine: int, version: VersionId) -> Buffer:
        buffer = self.agents[machine]._store.complete_buffer(owner, version)
        assert buffer is not None
        return buffer

    def corrupt(self, owner: int, machine: int, version: VersionId) -> None:
        buffer = self.copy(owner, machine, version)
        buffer.data[buffer.data_bytes // 2] ^= 8
        with pytest.raises(IntegrityError):
            buffer.verify()

    def find(self) -> list[RestoredShard | None]:
        with ThreadPoolExecutor(self.machines) as threads:
            return [future.result(60.0) for future in [threads.submit(memory.find) for memory in self.memories]]

    def resume_from(self, version: VersionId | None) -> None:
        with ThreadPoolExecutor(self.machines) as threads:
            for future in [threads.submit(memory.resume_from, version) for memory in self.memories]:
                future.result(60.0)

    def close(self) -> None:
        for memory in self.memories:
            with contextlib.suppress(OSError):
                memory.client.close()
        for agent in self.agents:
            agent.close()


def weights(rank: int, version: VersionId) -> torch.Tensor:
    return torch.arange(2000, dtype=torch.float32) * (rank + 1) + version.version


def assert_restored(found: list[RestoredShard | None], number: int) -> None:
    """Every rank has this version, bit by bit."""
    for rank, state in enumerate(found):
        assert state is not None
        assert (state.id, state.version, state.volatile) == (v(number), number, {"step": number})
        assert torch.equal(state.stable["weights"], weights(rank, v(number)))


Make = Callable[..., Cluster]


@pytest.fixture
def cluster(caplog: pytest.LogCaptureFixture) -> Iterator[Make]:
    caplog.set_level(logging.WARNING)
    directory, made = ShortDirectory(), []

    def make(machines: int = 2, replicas: int = 2) -> Cluster:
        made.append(Cluster(directory.path, machines, replicas))
        return made[-1]

    yield make
    for one in made:
        one.close()
    directory.remove()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]


def test_sound_memory_is_restored_without_a_word(cluster: Make, caplog: pytest.LogCaptureFixture) -> None:
    job = cluster()
    job.restart()
    found = job.find()
    assert_restored(found, 5)
    assert [state.tier for state in found if state] == [Tier.LOCAL_MEMORY] * 2
    assert not said(caplog)


def test_a_corrupt_own_copy_is_replaced_by_a_holders(cluster: Make, caplog: pytest.LogCaptureFixture) -> None:
    job = cluster()
    job.corrupt(1, 1, v(5))
    job.restart()
    found = job.find()
    assert_restored(found, 5)
    assert [state.tier for state in found if state] == [Tier.LOCAL_MEMORY, Tier.REMOTE_MEMORY]
    (message,) = said(caplog)
    assert message.startswith("rank 1: the copy of version 5 on machine 1 cannot be used (shard of rank 1")
    assert message.endswith("chunk 0 is corrupt); using the copy on machine 0 instead")
    job.copy(1, 1, v(5)).verify()


@pytest.mark.parametrize("word", [Word.STATE, Word.VERSION, Word.CHUNKS_READY, Word.HEADER_CHECKSUM])
def test_an_own_copy_with_a_corrupt_header_is_replaced_too(cluster: Make, word: Word) -> None:
    """Version 5 that reads as version 4 would be restored as that if nobody looked."""
    job = cluster()
    job.copy(0, 0, v(5))._words[word] ^= 1
    job.restart()
    assert_restored(job.find(), 5)
    job.copy(0, 0, v(5)).verify()


def test_a_corrupt_holder_is_passed_over_for_the_next_and_gets_a_good_copy(
    cluster: Make, caplog: pytest.LogCaptureFixture
) -> None:
    job = cluster(machines=3, replicas=3)
    job.corrupt(0, 1, v(5))
    job.lose(0)
    job.restart()
    assert_restored(job.find(), 5)
    (message,) = said(caplog)
    assert message.startswith("rank 0: the copy of version 5 on machine 1 cannot be used (")
    assert message.endswith("using the copy on machine 2 instead")
    job.resume_from(v(5))
    wait_until(lambda: is_sound(job, 0, 1, v(5)), "the corrupt copy is replaced")


def test_a_replica_that_nobody_read_is_checked_after_a_restart(cluster: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Software failures alone never read replicas: corrupt ones would be noticed when they are needed."""
    job = cluster()
    job.corrupt(1, 0, v(5))
    job.restart()
    assert_restored(job.find(), 5)
    wait_until(lambda: is_sound(job, 1, 0, v(5)), "the corrupt replica is replaced")
    assert "machine 0 drops its copy of version 5: shard of rank 1" in caplog.text


def is_sound(job: Cluster, owner: int, machine: int, version: VersionId) -> bool:
    buffer = job.agents[machine]._store.complete_buffer(owner, version)
    try:
        if buffer is not None:
            buffer.verify()
        return buffer is not None
    except IntegrityError:
        return False


def test_without_a_sound_copy_all_ranks_go_back_to_the_version_before(
    cluster: Make, caplog: pytest.LogCaptureFixture
) -> None:
    job = cluster()
    job.corrupt(0, 1, v(5))
    job.lose(0)
    job.restart()
    assert_restored(job.find(), 4)
    (message,) = said(caplog)
    assert message.startswith("rank 0: the copy of version 5 on machine 1 cannot be used (")
    assert message.endswith("all ranks load version 4 instead")


def test_without_any_sound_version_the_persistent_tier_is_next(cluster: Make, caplog: pytest.LogCaptureFixture) -> None:
    job = cluster()
    job.corrupt(0, 1, v(5))
    job.corrupt(0, 1, v(4))
    job.lose(0)
    job.restart()
    assert job.find() == [None, None]
    first, second = said(caplog)
    assert first.endswith("all ranks load version 4 instead")
    assert second.endswith("memory holds no other version of all ranks: the persistent tier is next")
    assert "version 5 lacks the shards of ranks 0; trying the persistent tier" in caplog.text
    job.resume_from(None)
    assert not any(agent._store.inventory().holdings for agent in job.agents)


def fail_to_read(monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception) -> None:
    """Lets the newest shard of a rank be fetched and verified, but not read."""
    decode, unreadable = shard.read, weights(rank, v(5))

    def read(data: memoryview) -> Any:
        stable, volatile = decode(data)
        if torch.equal(stable["weights"], unreadable):
            raise error
        return stable, volatile

    monkeypatch.setattr(shard, "read", read)


def test_memory_that_rots_again_and_again_does_not_hold_a_restore_up(
    cluster: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The fetched copy is corrupt as soon as it is there: it is fetched once more, not for ever."""
    job = cluster()
    job.restart()
    fail_to_read(monkeypatch, rank=0, error=IntegrityError("the bytes changed while they were read"))
    assert_restored(job.find(), 4)
    assert [message.rpartition("; ")[2] for message in said(caplog)] == [
        "using the copy on machine 1 instead",
        "all ranks load version 4 instead",
    ]


def test_a_shard_that_one_rank_cannot_read_is_an_error_to_all(cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = cluster()
    job.restart()
    fail_to_read(monkeypatch, rank=1, error=RestoreError("the script lacks a class"))
    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(memory.find) for memory in job.memories]:
            with pytest.raises(RestoreError, match="lacks a class"):
                future.result(30.0)


def test_pings_are_over_on_all_machines_before_any_sends_what_they_would_wait_behind(
    cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = cluster(3, 2).memories
    measured: list[tuple[Quantity, str]] = []
    somebody_sends = threading.Event()
    real = TcpTransport.measure

    def measure(self: TcpTransport, quantity: Quantity) -> float:
        measured.append((quantity, "begins"))
        if quantity is Quantity.BANDWIDTH:
            somebody_sends.set()
        elif self._machine == 0:
            somebody_sends.wait(0.5)  # the others have all the time to do so
        found = real(self, quantity)
        measured.append((quantity, "ends"))
        return found

    monkeypatch.setattr(TcpTransport, "measure", measure)
    with ThreadPoolExecutor(3) as threads:
        links = [future.result(60.0) for future in [threads.submit(each.measure_link) for each in memories]]
    assert all(link is not None and link.bandwidth_bytes_per_s > 1e6 and link.startup_s < 0.1 for link in links)
    assert len(measured) == 12
    assert {quantity for quantity, _ in measured[:6]} == {Quantity.STARTUP}
