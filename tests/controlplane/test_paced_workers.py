"""What a worker says about the network ends with it: agents with real sockets, and a worker that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from lightning_gemini.controlplane.agent import MachineAgent
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.link_speed import Quantity
from lightning_gemini.dataplane.pace_page import Pace
from tests.controlplane.agents import ROOT, ShortDirectory, Worker, introduce, make_agent
from tests.dataplane.machines import complete_ids, content_of, shard_bytes
from tests.dataplane.waiting import wait_until

SIZE = 3 * 2**20 + 5
Pair = tuple[MachineAgent, MachineAgent]


@pytest.fixture
def pair() -> Iterator[Pair]:
    directory = ShortDirectory()
    with make_agent(directory.path, 0) as one, make_agent(directory.path, 1) as other:
        introduce([one, other])
        neighbour = Worker(other, 1)  # says how shards are placed
        yield one, other
        neighbour.close()
    directory.remove()


@pytest.fixture
def doomed(pair: Pair) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a worker of rank 0 and returns it in the middle of its version."""
    made: list[subprocess.Popen[str]] = []

    def start(number: int, written: int) -> subprocess.Popen[str]:
        words = [str(pair[0].settings.socket_path), str(number), str(SIZE), str(written)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.controlplane.pacing_worker", *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        made.append(process)
        assert process.stdout is not None
        assert 50_000 <= int(process.stdout.readline()) < SIZE
        return process

    yield start
    for process in made:
        with process:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def test_what_a_killed_worker_had_written_gets_through(
    pair: Pair, doomed: Callable[..., subprocess.Popen[str]]
) -> None:
    process = doomed(1, SIZE)
    own = pair[0]._store.slab(0)
    assert own is not None
    assert own.pace.pace is Pace.PACED
    assert own.buffers[0].acked is None
    kill(process)
    wait_until(lambda: own.buffers[0].acked == VersionId(1, 1), "it is complete on the other machine")
    assert (own.pace.pace, own.pace.rushing, own.pace.held) == (Pace.FREE, False, False)
    kept = pair[1]._store.complete_buffer(0, VersionId(1, 1))
    assert kept is not None
    assert content_of(kept) == shard_bytes(0, VersionId(1, 1), SIZE)


def test_what_a_killed_worker_had_not_finished_costs_the_version_before_nothing(
    pair: Pair, doomed: Callable[..., subprocess.Popen[str]]
) -> None:
    first = Worker(pair[0], 0, size=SIZE)
    first.commit(1)
    first.close()
    kill(doomed(2, 2 * 2**20))
    replicas = pair[1]._store.slab(0)
    assert replicas is not None
    wait_until(lambda: not any(buffer.id == VersionId(1, 2) for buffer in replicas.buffers), "the holder forgets it")
    assert complete_ids(replicas) == complete_ids(pair[0]._store.slab(0)) == [VersionId(1, 1)]
    again = Worker(pair[0], 0, size=SIZE)
    again.commit(3)
    assert complete_ids(replicas) == [VersionId(1, 3), VersionId(1, 1)]
    again.close()


def test_a_new_generation_begins_with_everything_going_at_once(pair: Pair) -> None:
    worker = Worker(pair[0], 0, size=SIZE)
    worker.slab.pace.set_pace(Pace.PACED)
    worker.slab.pace.hold(True)
    introduce(pair, generation=2)
    assert (worker.slab.pace.pace, worker.slab.pace.held) == (Pace.FREE, False)
    worker.close()


def test_a_worker_asks_its_agent_for_the_links(pair: Pair) -> None:
    worker = Worker(pair[0], 0, size=SIZE)
    startups_s = worker.client.measure_links(Quantity.STARTUP)
    assert list(startups_s) == [1]
    assert 0 < startups_s[1] < 1
    assert worker.client.measure_links(Quantity.BANDWIDTH)[1] > 1e6
    assert worker.client.measure_links(Quantity.STARTUP) == startups_s
    worker.close()


def test_a_machine_whose_shards_nobody_else_holds_has_no_links_to_measure(pair: Pair) -> None:
    worker = Worker(pair[0], 0, replicas=1, size=SIZE)
    assert worker.client.measure_links(Quantity.STARTUP) == {}
    worker.close()
