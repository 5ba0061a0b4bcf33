"""The machine's agent: keeps its workers' memory, replicates, retrieves, and survives whatever it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.controlplane import agent_client
from lightning_gemini.controlplane.agent import MachineAgent
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.controlplane.messages import MAX_MESSAGE_BYTES, receive_message, send_message
from lightning_gemini.core.recovery import Fetch, VersionId
from lightning_gemini.dataplane import capacity, wire
from lightning_gemini.dataplane.slab import Slab, chunk_bytes_for
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import (
    AgentError,
    CapacityError,
    IntegrityError,
    LayoutMismatchError,
    PlacementError,
    ProtocolError,
)
from lightning_gemini.version import __version__
from tests.controlplane.agents import JOB, SECRET, ShortDirectory, Worker, introduce, make_agent
from tests.dataplane.machines import content_of, shard_bytes, write_version
from tests.dataplane.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def v(number: int, generation: int = 1) -> VersionId:
    return VersionId(generation, number)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = ShortDirectory()
    yield made.path
    made.remove()


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., MachineAgent]]:
    with contextlib.ExitStack() as stack:
        yield lambda machine=0, **fields: stack.enter_context(make_agent(directory, machine, **fields))


@pytest.fixture
def worker(directory: Path) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(agent: MachineAgent, rank: int, **fields: Any) -> Worker:
        made.append(Worker(agent, rank, **fields))
        return made[-1]

    yield make
    for one in made:
        one.close()


Start = Callable[..., MachineAgent]
MakeWorker = Callable[..., Worker]


@pytest.fixture
def alone(start: Start) -> MachineAgent:
    """An agent of a job with one machine and two ranks."""
    agent = start()
    introduce([agent], nproc=2)
    return agent


@pytest.fixture
def pair(start: Start) -> tuple[MachineAgent, MachineAgent]:
    """The agents of a job with two machines of one rank each."""
    agents = start(0), start(1)
    introduce(agents)
    return agents


Pair = tuple[MachineAgent, MachineAgent]


def connect(agent: MachineAgent, **fields: Any) -> AgentClient:
    return AgentClient(agent.settings.socket_path, JOB, **fields)


def holdings(agent: MachineAgent) -> set[tuple[int, int, bool]]:
    with connect(agent) as client:
        return {(held["owner"], held["version"], held["complete"]) for held in client.status()["holdings"]}


# -- who is served -----------------------------------------------------------------------------------------------------


def test_an_agent_introduces_itself(alone: MachineAgent) -> None:
    with connect(alone) as client:
        identity = client.identity
    assert (identity["machine"], identity["pid"], identity["generation"]) == (0, os.getpid(), 1)
    assert (bytes.fromhex(identity["secret"]), tuple(identity["address"])) == (SECRET, alone.replica_address)


def test_another_job_is_refused_with_the_remedy(alone: MachineAgent) -> None:
    with pytest.raises(
        AgentError, match=f"serves job {JOB}, not other: unset LIGHTNING_GEMINI_AGENT or stop that agent"
    ):
        AgentClient(alone.settings.socket_path, "other")


def test_another_version_is_refused_with_the_remedy(alone: MachineAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_client, "__version__", "99.0")
    with pytest.raises(
        AgentError, match=f"is lightning-gemini {__version__}, the caller 99.0: run 'lightning-gemini stop"
    ):
        connect(alone)


def test_nobody_there_is_said_with_the_path(directory: Path) -> None:
    with pytest.raises(AgentError, match=f"no agent at {directory}/none.sock"):
        AgentClient(directory / "none.sock", JOB)


def test_sockets_are_for_this_user_alone(alone: MachineAgent) -> None:
    assert alone.settings.socket_path.stat().st_mode & 0o777 == 0o600


# -- requests that are not as they should be ---------------------------------------------------------------------------

HELLO = {"request": "hello", "job": JOB, "version": __version__, "pid": 1}


@pytest.fixture
def raw(alone: MachineAgent) -> Iterator[socket.socket]:
    """A connection that introduced itself."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10.0)
        sock.connect(str(alone.settings.socket_path))
        send_message(sock, HELLO)
        receive_message(sock)
        yield sock


MALFORMED: list[dict[str, Any]] = [
    {},
    {"request": None},
    {"request": 7},
    {"request": ["hello"]},
    {"request": "unheard of"},
    {"request": "_handle"},
    {"request": "hello"},
    {"request": "hello", "job": JOB},
    {"request": "hello", "job": JOB, "version": __version__, "pid": "many"},
    {"request": "secret"},
    {"request": "secret", "secret": "no hex"},
    {"request": "secret", "secret": 5},
    {"request": "peers"},
    {"request": "peers", "generation": 1, "nproc": 2, "addresses": 3},
    {"request": "peers", "generation": 1, "nproc": 2, "addresses": [["127.0.0.1"]]},
    {"request": "peers", "generation": 9, "nproc": "two", "addresses": []},
    {"request": "join"},
    {"request": "join", "rank": 0, "replicas": 0, "placement": "mixed"},
    {"request": "join", "rank": 0, "replicas": 1, "placement": "somewhere"},
    {"request": "join", "rank": 2, "replicas": 1, "placement": "mixed"},
    {"request": "join", "rank": -1, "replicas": 1, "placement": "mixed"},
    {"request": "attach", "bytes": 100},
    {"request": "discard", "id": {"generation": 1, "version": 1}},
    {"request": "retrieve", "fetches": 1},
    {"request": "retrieve", "fetches": [{}]},
    {"request": "retrieve", "fetches": [{"owner": 0, "source": 5, "target": 0, "id": {"generation": 1, "version": 1}}]},
    {"request": "resume_from"},
    {"request": "resume_from", "id": "all"},
    {"request": "resume_from", "id": {"generation": "1", "version": 1}},
]


@pytest.mark.parametrize("request_", MALFORMED, ids=json.dumps)
def test_a_malformed_request_gets_an_error_and_the_conversation_goes_on(
    alone: MachineAgent, raw: socket.socket, request_: dict[str, Any]
) -> None:
    send_message(raw, request_)
    answer, _ = receive_message(raw)
    assert answer["error"]
    assert answer["kind"] in ("ProtocolError", "PlacementError", "AgentError")
    send_message(raw, {"request": "status"})
    assert receive_message(raw)[0]["job"] == JOB
    assert alone._store.generation == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        struct.pack("<I", MAX_MESSAGE_BYTES + 1) + b"{",
        struct.pack("<I", 3) + b"abc",
        struct.pack("<I", 4) + b"null",
        struct.pack("<I", 2) + b"[]",
        struct.pack("<I", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<I", 200_000) + b"[" * 200_000,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["length", "too long", "no json", "null", "list", "no text", "nested", "http"],
)
def test_what_is_no_message_gets_an_error_and_is_hung_up_on(
    alone: MachineAgent, raw: socket.socket, sent: bytes
) -> None:
    with contextlib.suppress(BrokenPipeError):
        raw.sendall(sent)
    answer, _ = receive_message(raw)
    assert answer["kind"] == "ProtocolError"
    with pytest.raises((EOFError, ConnectionError)):
        receive_message(raw)
    with connect(alone) as client:
        assert client.status()["job"] == JOB


def test_random_bytes_harm_nobody(alone: MachineAgent, seed: int) -> None:
    noise = random.Random(seed)
    for _ in range(40):
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(str(alone.settings.socket_path))
            body = noise.randbytes(noise.randrange(300))
            sock.sendall(struct.pack("<I", len(body)) + body if noise.random() < 0.5 else body)
    with connect(alone) as client:
        assert client.status()["job"] == JOB
    wait_until(lambda: threads_named("worker-connection") == 0, "every connection ended")


def threads_named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


@pytest.mark.parametrize("request_", ["status", "stop", "peers", "join", "secret"])
def test_who_has_not_introduced_itself_gets_nothing(alone: MachineAgent, request_: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10.0)
        sock.connect(str(alone.settings.socket_path))
        for first in ({"request": request_}, {**HELLO, "job": "other"}, {"request": request_}):
            send_message(sock, first)
            assert "error" in receive_message(sock)[0]
    assert not alone.closed.is_set()


def test_descriptors_that_nobody_asked_for_are_closed(alone: MachineAgent, raw: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        send_message(raw, {"request": "status"}, [raw.fileno()] * 8)
        receive_message(raw)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_to_a_notice_is_not_taken_for_the_next_answer(alone: MachineAgent, raw: socket.socket) -> None:
    alone._replicator.notify = lambda: 1 / 0  # type: ignore[method-assign, assignment]
    send_message(raw, {"request": "notify"})
    send_message(raw, {"request": "status"})
    assert receive_message(raw)[0]["job"] == JOB


def test_an_agent_that_answers_too_late_is_not_asked_again(directory: Path) -> None:
    """Its late answer would be taken for that to the next request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "slow.sock"))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError, EOFError):
                receive_message(sock)
                send_message(sock, {"pid": 1})
                receive_message(sock)
                late.wait(10.0)
                send_message(sock, {"answer": "to the first question"})
                receive_message(sock)  # until the client hangs up

        late = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        with AgentClient(directory / "slow.sock", JOB, timeout_s=0.2) as client:
            with pytest.raises(AgentError, match="went away"):
                client.status()
            late.set()
            with pytest.raises(AgentError, match="went away"):
                client.report()
        thread.join(10.0)


def test_a_worker_waits_for_large_memory(alone: MachineAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Slab.create

    def slow_create(owner: int, data_bytes: int) -> Slab:
        assert not threading.Event().wait(1.0)  # as long as gigabytes take
        return create(owner, data_bytes)

    monkeypatch.setattr(Slab, "create", slow_create)
    monkeypatch.setattr(agent_client, "_NEW_MEMORY_BYTES_PER_S", 1000)
    with AgentClient(alone.settings.socket_path, JOB) as client:
        client.set_peers(1, 2, [("127.0.0.1", 1)])
        client.join(0, 1, "group")
        client._timeout_s = 0.2
        slab = client.attach(10_000)
        assert len(slab.buffers[0].data) == 10_000
        slab.close()


def test_a_client_of_an_agent_that_ended_says_so(start: Start) -> None:
    agent = start()
    client = connect(agent)
    agent.close()
    for call in (client.status, client.notify, client.notify):
        with contextlib.suppress(AgentError):
            call()
    with pytest.raises(AgentError, match="went away"):
        client.status()
    client.close()


# -- memory of workers -------------------------------------------------------------------------------------------------


def test_a_worker_writes_what_its_agent_keeps(alone: MachineAgent, worker: MakeWorker) -> None:
    first = worker(alone, 0, replicas=1)
    second = worker(alone, 1, replicas=1)
    first.publish(7)
    second.publish(8)
    first.slab.buffers[0].report_progress(9)
    first.close()
    assert holdings(alone) == {(0, 7, True), (1, 8, True)}
    assert alone.progress() == {0: 9, 1: 0}
    again = worker(alone, 0, replicas=1)
    buffer = again.slab.holding(v(7))
    assert buffer is not None
    assert content_of(buffer) == shard_bytes(0, v(7), 5000)


def test_what_a_worker_had_not_finished_is_forgotten_when_it_goes(alone: MachineAgent, worker: MakeWorker) -> None:
    one = worker(alone, 0, replicas=1)
    one.publish(7)
    write_version(one.slab.buffers[1], v(8), 5000, until_byte=4999)
    assert holdings(alone) == {(0, 7, True), (0, 8, False)}
    one.client.close()
    wait_until(lambda: holdings(alone) == {(0, 7, True)}, "the agent notices")


def test_a_restarted_worker_is_not_harmed_by_the_end_of_its_older_self(alone: MachineAgent, worker: MakeWorker) -> None:
    older = worker(alone, 0, replicas=1)
    newer = worker(alone, 0, replicas=1)
    alone._workers[0] = -1  # they are one process here
    write_version(newer.slab.buffers[0], v(8), 5000, until_byte=100)
    before = threads_named("worker-connection")
    older.client.close()
    wait_until(lambda: threads_named("worker-connection") == before - 1, "the agent notices")
    assert holdings(alone) == {(0, 8, False)}


def test_a_slab_is_made_only_where_that_is_asked_for(alone: MachineAgent) -> None:
    with connect(alone) as client:
        report = client.join(0, 1, "mixed")
        assert (report["replicas"], report["placement"], report["nproc"]) == (1, "mixed", 2)
        assert client.attach_existing() is None
        slab = client.attach(1000)
        again = client.attach_existing()
        assert again is not None
        assert os.fstat(again.buffers[0].fd).st_ino == os.fstat(slab.buffers[0].fd).st_ino
        assert not os.get_inheritable(slab.buffers[0].fd)  # a program that the script starts must not hold the memory
        again.close()
        slab.close()


def test_a_machine_without_memory_says_so_to_its_worker(alone: MachineAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda: 2**30)
    with connect(alone) as client:
        client.join(0, 1, "mixed")
        with pytest.raises(CapacityError, match="2 buffers x 1 replicas x 2 ranks x 300 MiB = 1200 MiB per machine"):
            client.attach(300 * 2**20)
        client.attach(1000).close()


def test_errors_keep_their_kind_on_the_way(alone: MachineAgent, worker: MakeWorker) -> None:
    worker(alone, 0, replicas=1)
    with connect(alone) as client:
        with pytest.raises(PlacementError, match="replicas=2 needs 2 machines"):
            client.join(0, 2, "mixed")
        with pytest.raises(LayoutMismatchError, match="1 machines x 2 ranks, this run has 2 x 1"):
            client.set_peers(2, 1, [("127.0.0.1", 1), ("127.0.0.1", 2)])
        with pytest.raises(ProtocolError, match="rank 2 is not of machine 0"):
            client.join(2, 1, "mixed")


def test_the_status_tells_all(alone: MachineAgent, worker: MakeWorker) -> None:
    alone.status_extra = lambda: {"root": 3}
    one = worker(alone, 1, replicas=1)
    one.publish(5)
    with connect(alone) as client:
        status = client.status()
    assert (status["job"], status["machine"], status["pid"], status["root"]) == (JOB, 0, os.getpid(), 3)
    assert (status["version"], status["generation"], status["progress"]) == (__version__, 1, {"1": 0})
    assert status["workers"] == [{"rank": 1, "pid": os.getpid()}]
    assert status["memory_bytes"] > 2 * 5000
    held = {"owner": 1, "generation": 1, "version": 5, "complete": True, "bytes": 5000, "role": "owner"}
    assert status["holdings"] == [held]


def test_a_rank_that_refuses_to_train_is_passed_on(alone: MachineAgent, worker: MakeWorker) -> None:
    said: list[tuple[int, str]] = []
    alone.on_fatal = lambda rank, message: said.append((rank, message))
    worker(alone, 1, replicas=1).client.fatal(1, "the model has other weights")
    assert said == [(1, "the model has other weights")]


# -- replication and retrieval -----------------------------------------------------------------------------------------


def test_versions_are_replicated_and_acknowledged(pair: Pair, worker: MakeWorker) -> None:
    workers = worker(pair[0], 0), worker(pair[1], 1)
    for number in (1, 2, 3):
        for one in workers:
            one.commit(number)
    assert holdings(pair[0]) == holdings(pair[1]) == {(owner, n, True) for owner in (0, 1) for n in (2, 3)}
    with connect(pair[1]) as client:
        roles = {held["owner"]: held["role"] for held in client.status()["holdings"]}
    assert roles == {0: "replica", 1: "owner"}


def test_a_machine_that_lost_its_memory_gets_its_shard_back(pair: Pair, start: Start, worker: MakeWorker) -> None:
    worker(pair[1], 1)
    worker(pair[0], 0).commit(4)
    pair[0].close()
    fresh = start(0)
    introduce([fresh, pair[1]], generation=2)
    back = AgentClient(fresh.settings.socket_path, JOB)
    back.join(0, 2, "mixed")
    assert back.attach_existing() is None
    received, seconds = back.retrieve([Fetch(0, 1, 0, v(4)), Fetch(1, 0, 1, v(4))])  # the second is not ours
    assert (received, seconds > 0) == (5000, True)
    assert back.retrieve([Fetch(0, 1, 0, v(4))])[0] == 0
    slab = back.attach_existing()
    assert slab is not None
    buffer = slab.holding(v(4))
    assert buffer is not None
    assert content_of(buffer) == shard_bytes(0, v(4), 5000)
    assert [held["retrieved"] for held in back.report()["holdings"]] == [True]
    back.resume_from(v(4))
    assert [held["retrieved"] for held in back.report()["holdings"]] == [False]
    wait_until(lambda: buffer.acked == v(4), "what was retrieved is known to be replicated")
    slab.close()
    back.close()


def test_a_shard_that_cannot_be_fetched_is_an_error_to_the_worker_and_no_more(pair: Pair, worker: MakeWorker) -> None:
    one = worker(pair[0], 0)
    worker(pair[1], 1)
    with pytest.raises(ProtocolError, match="does not hold"):
        one.client.retrieve([Fetch(0, 1, 0, v(9))])
    with pytest.raises(ProtocolError, match="machine 7 is not in this generation"):
        one.client.retrieve([Fetch(0, 7, 0, v(9))])
    pair[1].close()
    with pytest.raises(AgentError):
        one.client.retrieve([Fetch(0, 1, 0, v(9))])
    assert one.client.status()["job"] == JOB


def test_a_corrupt_copy_is_an_integrity_error_to_the_worker(pair: Pair, worker: MakeWorker) -> None:
    one = worker(pair[0], 0)
    worker(pair[1], 1)
    one.commit(4)
    replica = pair[1]._store.complete_buffer(0, v(4))
    assert replica is not None
    replica.data[17] ^= 1
    one.client.discard(v(4))
    with pytest.raises(IntegrityError, match="chunk 0"):
        one.client.retrieve([Fetch(0, 1, 0, v(4))])
    assert (0, 4, True) not in holdings(pair[0])


def test_agents_of_a_plain_script_agree_on_one_secret(start: Start, worker: MakeWorker) -> None:
    agents = start(0, secret=b"one"), start(1, secret=b"two")
    with connect(agents[0]) as first, connect(agents[1]) as second:
        second.share_secret(first.identity["secret"])
    introduce(agents)
    workers = worker(agents[1], 1), worker(agents[0], 0)
    for one in workers:
        one.commit(1)


# -- generations -------------------------------------------------------------------------------------------------------

SIZE = 2 * chunk_bytes_for(1)


@contextlib.contextmanager
def pushing(agent: MachineAgent, number: int) -> Iterator[socket.socket]:
    """Half of a version of rank 0 is on its way to this agent."""
    with wire.connect(agent.replica_address, JOB, SECRET, 0, timeout_s=10.0) as sock:
        frame = Frame(Kind.BEGIN, 0, v(number), SIZE, chunk_bytes_for(SIZE), sender_generation=1)
        wire.send(sock, frame)
        assert wire.receive(sock).kind is Kind.WANT
        send_chunk(sock, number, 0)
        yield sock


def send_chunk(sock: socket.socket, number: int, index: int) -> None:
    import xxhash

    size = chunk_bytes_for(SIZE)
    chunk = shard_bytes(0, v(number), SIZE)[index * size : (index + 1) * size]
    checksum = xxhash.xxh3_64_intdigest(chunk)
    wire.send(sock, Frame(Kind.CHUNK, 0, v(number), index, 0, len(chunk), checksum), chunk)


def test_what_an_older_generation_still_sends_never_counts(pair: Pair, worker: MakeWorker) -> None:
    """After the report of a generation nothing may appear in memory that the report does not have."""
    worker(pair[1], 1)
    with pushing(pair[1], 5) as sock:
        wait_until(lambda: holdings(pair[1]) == {(0, 5, False)}, "half of it is there")
        introduce(pair, generation=2)
        assert holdings(pair[1]) == set()
        with contextlib.suppress(OSError):
            send_chunk(sock, 5, 1)
            wire.send(sock, Frame(Kind.END, 0, v(5)))
            assert sock.recv(1) == b""
    assert holdings(pair[1]) == set()


def test_what_one_generation_acknowledged_means_nothing_to_the_next(pair: Pair, worker: MakeWorker) -> None:
    one, other = worker(pair[0], 0), worker(pair[1], 1)
    one.commit(3)
    other.commit(3)
    pair[1].close()
    introduce_alone = [pair[0].replica_address, ("127.0.0.1", 9)]
    pair[0].set_peers(2, 1, introduce_alone)
    one.client.notify()
    one.client.status()  # the notice was heard
    assert all(buffer.acked is None for buffer in one.slab.buffers)
    assert holdings(pair[0]) == {(0, 3, True), (1, 3, True)}


def test_an_unfinished_version_of_the_older_generation_is_dropped(pair: Pair, worker: MakeWorker) -> None:
    one = worker(pair[0], 0)
    write_version(one.slab.buffers[0], v(3), 5000, until_byte=10)
    introduce(pair, generation=2)
    assert one.slab.buffers[0].id is None


def test_a_retrieval_waits_for_a_push_of_the_same_shard(pair: Pair, worker: MakeWorker) -> None:
    """After a machine was replaced, refills and the owner's own replicas come at once: they must not mix."""
    worker(pair[0], 0)
    worker(pair[1], 1)
    with pushing(pair[1], 5) as sock, ThreadPoolExecutor(1) as threads:
        refill = threads.submit(pair[1].retrieve, [Fetch(0, 0, 1, v(5))])
        send_chunk(sock, 5, 1)
        assert not refill.done()
        wire.send(sock, Frame(Kind.END, 0, v(5)))
        assert wire.receive(sock).kind is Kind.ACK
        assert refill.result(10.0)[0] == 0
    kept = pair[1]._store.complete_buffer(0, v(5))
    assert kept is not None
    assert content_of(kept) == shard_bytes(0, v(5), SIZE)


def test_a_push_is_refused_while_the_same_shard_is_retrieved(pair: Pair, worker: MakeWorker) -> None:
    worker(pair[1], 1)
    with pair[1]._store.writer(0), wire.connect(pair[1].replica_address, JOB, SECRET, 0, timeout_s=10.0) as sock:
        wire.send(sock, Frame(Kind.BEGIN, 0, v(5), SIZE, chunk_bytes_for(SIZE), sender_generation=1))
        answer = wire.receive(sock)
        assert answer.kind is Kind.REFUSE
        assert "still receiving" in wire.receive_reason(sock, answer)


def test_a_new_generation_ends_the_retrieval_of_the_older_one(start: Start) -> None:
    """It may hang on a machine that is gone, and must not hold up the next plan."""
    agent = start(0)
    with socket.create_server(("127.0.0.1", 0)) as stuck, ThreadPoolExecutor(1) as threads:
        addresses = [agent.replica_address, stuck.getsockname()]
        agent.set_peers(1, 1, addresses)
        retrieval = threads.submit(agent.retrieve, [Fetch(0, 1, 0, v(5)), Fetch(0, 1, 0, v(4))])
        sock, _ = stuck.accept()
        with sock:
            wire.accept(sock, JOB, SECRET, timeout_s=10.0)
            assert wire.receive(sock).kind is Kind.FETCH  # and no answer
            agent.set_peers(2, 1, addresses)
            with pytest.raises(OSError):  # noqa: PT011 - any kind
                retrieval.result(5.0)
            assert sock.recv(1) == b""
        stuck.settimeout(0.1)
        with pytest.raises(TimeoutError):
            stuck.accept()  # nor does it go on with the rest of the older plan


def test_a_retrieval_that_was_ordered_for_an_older_generation_does_not_begin(
    pair: Pair, worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered, overtaken = threading.Event(), threading.Event()

    class Waiting:
        """The lock of the retrievals, while another one has it."""

        def __enter__(self) -> None:
            ordered.set()
            assert overtaken.wait(10.0)

        def __exit__(self, *_: object) -> None:
            pass

    worker(pair[1], 1)
    worker(pair[0], 0).commit(4)
    pair[0]._store.discard(0, v(4))
    monkeypatch.setattr(pair[0], "_retrieving", Waiting())
    with ThreadPoolExecutor(1) as threads:
        retrieval = threads.submit(pair[0].retrieve, [Fetch(0, 1, 0, v(4))])
        assert ordered.wait(10.0)
        introduce(pair, generation=2)
        overtaken.set()
        with pytest.raises(ProtocolError, match="retrieval given up: generation 2 began"):
            retrieval.result(10.0)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_stopping_frees_everything(start: Start, worker: MakeWorker) -> None:
    agent = start()
    introduce([agent])
    worker(agent, 0, replicas=1).publish(1)
    slabs = agent._store.slabs()
    with connect(agent) as client:
        client.stop()
        assert agent.closed.wait(10.0)
    assert not agent.settings.socket_path.exists()
    assert all(buffer.fd < 0 for slab in slabs for buffer in slab.buffers)
    for name in ("control", "replica-server", "worker-connection", "replica-connection"):
        wait_until(lambda name=name: threads_named(name) == 0, f"no {name} thread is left")  # type: ignore[misc]


def test_closing_is_idempotent_from_any_thread(pair: Pair, worker: MakeWorker) -> None:
    worker(pair[1], 1)
    worker(pair[0], 0).commit(1)
    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(agent.close) for agent in pair * 4]:
            future.result(20.0)
    assert all(agent.closed.is_set() for agent in pair)


def test_an_agent_that_cannot_listen_leaves_nothing_open(start: Start, directory: Path) -> None:
    start(0)
    ports = threads_named("replica-server")
    second = make_agent(directory, 0)
    with pytest.raises(AgentError, match=f"another agent serves {directory}/0.sock: stop it"):
        second.start()
    wait_until(lambda: threads_named("replica-server") <= ports, "its server is closed")
    second.close()
    assert (directory / "0.sock").exists()
    with connect_to(directory / "0.sock") as client:
        assert client.status()["job"] == JOB


def connect_to(path: Path) -> AgentClient:
    return AgentClient(path, JOB)


def test_an_idle_agent_leaves_but_not_while_a_worker_is_there(start: Start, worker: MakeWorker) -> None:
    agent = start(idle_timeout_s=0.3)
    introduce([agent])
    one = worker(agent, 0, replicas=1)
    assert not agent.closed.wait(0.8)
    one.client.close()
    assert agent.closed.wait(10.0)
