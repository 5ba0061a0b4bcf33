"""Workers that write a peer's shard into their agent's memory themselves: one at a time, and only while they live."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_gemini.callbacks.replica_desk import AgentDesk
from lightning_gemini.controlplane.agent import MachineAgent
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer, chunk_bytes_for
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import IntegrityError, ProtocolError
from tests.controlplane.agents import JOB, ShortDirectory, Worker, introduce, make_agent
from tests.dataplane.machines import complete_ids, content_of, shard_bytes, write_version
from tests.dataplane.rigs import p2p_transport
from tests.dataplane.waiting import wait_until

ROOT = Path(__file__).parents[2]
OWNER = 0  # the rank of machine 0; machine 1 holds its replicas
CHUNK = chunk_bytes_for(1)
SIZE = 3 * CHUNK + 1000
OLD, NEW = VersionId(1, 4), VersionId(1, 5)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = ShortDirectory()
    yield made.path
    made.remove()


@pytest.fixture
def holder(directory: Path) -> Iterator[MachineAgent]:
    """The agent of machine 1, whose worker has joined."""
    with make_agent(directory, 0) as owner, make_agent(directory, 1) as agent:
        introduce([owner, agent])
        worker = Worker(agent, 1)
        yield agent
        worker.close()


Connect = Callable[[], AgentDesk]


@pytest.fixture
def connect(holder: MachineAgent) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def make() -> AgentDesk:
            return stack.enter_context(contextlib.closing(AgentDesk(client_of(holder))))

        yield make


def client_of(agent: MachineAgent) -> AgentClient:
    return AgentClient(agent.settings.socket_path, JOB)


def begin(version: VersionId, *, size: int = SIZE, generation: int = 1, owner: int = OWNER) -> Frame:
    return Frame(Kind.BEGIN, owner, version, size, chunk_bytes_for(size), sender_generation=generation)


def fill(buffer: Buffer, version: VersionId, chunks: int, size: int = SIZE) -> None:
    buffer.data[:size] = shard_bytes(OWNER, version, size)
    buffer.seal(min(chunks * CHUNK, size))


def take(desk: AgentDesk, version: VersionId, size: int = SIZE) -> None:
    """Take a whole version in."""
    buffer = desk.begin(begin(version, size=size))
    assert buffer is not None
    fill(buffer, version, buffer.chunks, size)
    buffer.complete()
    desk.end()


def held(agent: MachineAgent) -> list[VersionId | None]:
    return complete_ids(agent._store.slab(OWNER))


def started(agent: MachineAgent) -> set[VersionId | None]:
    slab = agent._store.slab(OWNER)
    return {buffer.id for buffer in slab.buffers} - {None} if slab else set()


def test_what_a_worker_writes_is_the_agents(holder: MachineAgent, connect: Connect) -> None:
    desk = connect()
    take(desk, OLD)
    take(desk, NEW)
    assert held(holder) == [NEW, OLD]
    kept = holder._store.complete_buffer(OWNER, NEW)
    assert kept is not None
    assert content_of(kept) == shard_bytes(OWNER, NEW, SIZE)


def test_a_shard_that_grows_is_mapped_anew(holder: MachineAgent, connect: Connect) -> None:
    desk = connect()
    for number, size in enumerate((100, SIZE, 2 * SIZE, 50), start=1):
        take(desk, VersionId(1, number), size)
        kept = holder._store.complete_buffer(OWNER, VersionId(1, number))
        assert kept is not None
        assert content_of(kept) == shard_bytes(OWNER, VersionId(1, number), size)


def test_what_is_there_is_not_taken_again_unless_it_is_damaged(holder: MachineAgent, connect: Connect) -> None:
    desk = connect()
    take(desk, NEW)
    assert desk.begin(begin(NEW)) is None
    kept = holder._store.complete_buffer(OWNER, NEW)
    assert kept is not None
    kept.data[CHUNK + 3] ^= 1
    with pytest.raises(IntegrityError):
        kept.verify()
    take(desk, NEW)
    assert content_of(kept) == shard_bytes(OWNER, NEW, SIZE)


def test_two_workers_do_not_write_one_shard(holder: MachineAgent, connect: Connect) -> None:
    first, second = connect(), connect()
    buffer = first.begin(begin(OLD))
    assert buffer is not None
    with pytest.raises(ProtocolError, match="still receiving"):
        second.begin(begin(NEW))
    with pytest.raises(ProtocolError, match="still receiving"):
        first.begin(begin(NEW))
    fill(buffer, OLD, buffer.chunks)
    buffer.complete()
    first.end()
    take(second, NEW)
    assert held(holder) == [NEW, OLD]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (begin(NEW, generation=0), "is in generation 1, the sender in 0"),
        (begin(NEW, generation=2), "is in generation 1, the sender in 2"),
        (begin(NEW, owner=77), "does not hold replicas of rank 77"),
    ],
)
def test_what_is_not_wanted_is_refused(holder: MachineAgent, connect: Connect, asked: Frame, why: str) -> None:
    desk = connect()
    with pytest.raises(ProtocolError, match=why):
        desk.begin(asked)
    take(desk, NEW)


def test_what_was_not_finished_is_dropped_at_the_end(holder: MachineAgent, connect: Connect) -> None:
    desk = connect()
    take(desk, OLD)
    buffer = desk.begin(begin(NEW))
    assert buffer is not None
    fill(buffer, NEW, 2)
    assert started(holder) == {OLD, NEW}
    desk.end()
    desk.end()
    assert started(holder) == {OLD}


def test_a_connection_that_ends_gives_its_buffer_back(holder: MachineAgent, connect: Connect) -> None:
    desk = connect()
    take(desk, OLD)
    buffer = desk.begin(begin(NEW))
    assert buffer is not None
    fill(buffer, NEW, 2)
    desk.close()
    wait_until(lambda: started(holder) == {OLD}, "the torn version is dropped")
    take(connect(), NEW)
    assert held(holder) == [NEW, OLD]


def test_a_new_generation_waits_for_writers_that_it_tells(holder: MachineAgent, connect: Connect) -> None:
    """As the receiver: it looks at the buffer before each piece."""
    desk = connect()
    take(desk, OLD)
    buffer = desk.begin(begin(NEW))
    assert buffer is not None
    fill(buffer, NEW, 2)
    with ThreadPoolExecutor(1) as threads:
        entering = threads.submit(introduce, [holder, holder], 2)
        wait_until(lambda: buffer.id is None, "the writer is told")
        assert not entering.done()
        desk.end()
        entering.result(10.0)
    assert started(holder) == {OLD}


def test_a_receiver_that_is_killed_leaves_the_old_version(
    holder: MachineAgent, connect: Connect, tmp_path: Path
) -> None:
    """The owner's push fails at once, and another receiver takes the version."""
    own = Buffer.create(OWNER, SIZE)
    take(connect(), OLD)
    write_version(own, NEW, SIZE, until_byte=2 * CHUNK)
    arguments = [str(holder.settings.socket_path), JOB, str(tmp_path / "pair")]
    receiver = subprocess.Popen([sys.executable, "-m", "tests.dataplane.doomed_receiver", *arguments], cwd=ROOT)
    with ThreadPoolExecutor(1) as threads:
        transport = p2p_transport(tmp_path / "pair", 1)
        pushing = threads.submit(transport.push, own, NEW, lambda: True)
        try:
            wait_until(lambda: _ready(holder, NEW) == 2, "half of it arrives")
        finally:
            os.kill(receiver.pid, signal.SIGKILL)
            assert receiver.wait() == -9
            own.seal(SIZE)
        with pytest.raises(OSError):  # noqa: PT011 - any kind
            pushing.result(20.0)
    wait_until(lambda: started(holder) == {OLD}, "the torn version is dropped")
    kept = holder._store.complete_buffer(OWNER, OLD)
    assert kept is not None
    assert content_of(kept) == shard_bytes(OWNER, OLD, SIZE)
    take(connect(), NEW)
    assert held(holder) == [NEW, OLD]
    own.close()


def _ready(agent: MachineAgent, version: VersionId) -> int:
    slab = agent._store.slab(OWNER)
    return max((buffer.chunks_ready for buffer in slab.buffers if buffer.id == version), default=-1) if slab else -1


def test_a_worker_says_what_its_peers_hold(directory: Path, holder: MachineAgent) -> None:
    worker = Worker(holder, 1)
    buffer = worker.publish(5)
    worker.slab.pace.hold(True)
    worker.client.note_held(1, 0, VersionId(1, 5), 1)
    wait_until(lambda: buffer.acked == VersionId(1, 5), "the version is acknowledged")
    worker.client.note_held(1, 0, VersionId(1, 6), 0)  # an older generation's word
    worker.publish(6)
    worker.client.report()
    assert all(one.acked != VersionId(1, 6) for one in worker.slab.buffers)
    worker.close()
