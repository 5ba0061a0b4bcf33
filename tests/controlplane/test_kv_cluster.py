"""What is left of the promises of a key-value store when members of a real etcd of three die or hang."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_gemini.controlplane.election import Election
from lightning_gemini.controlplane.kv.base import KeyChange, StoreUnavailableError
from lightning_gemini.controlplane.kv.cluster import EtcdCluster
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore, load_etcd3
from lightning_gemini.controlplane.session import Session
from lightning_gemini.errors import ConfigurationError
from tests.dataplane.waiting import wait_until

TIMEOUT_S = 2.0
TTL_S = 2


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(tmp_path / "etcd", members=3)
    cluster.start()
    yield cluster
    for pid in cluster.pids:
        os.kill(pid, signal.SIGCONT)
    cluster.close()


@pytest.fixture
def connect(cluster: EtcdCluster) -> Iterator[Callable[..., EtcdKeyValueStore]]:
    stores: list[EtcdKeyValueStore] = []

    def make(endpoint: str | None = None, timeout_s: float = TIMEOUT_S) -> EtcdKeyValueStore:
        stores.append(EtcdKeyValueStore(endpoint or cluster.endpoint, timeout_s))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def leader(cluster: EtcdCluster) -> int:
    """Which member leads, as one that answers says."""
    for endpoint in cluster.endpoint.split(","):
        host, port = endpoint.split(":")
        client = load_etcd3().client(host, int(port), timeout=1)
        with contextlib.suppress(load_etcd3().Etcd3Exception), contextlib.closing(client):
            return int(client.status().leader.name.removeprefix("member-"))
    raise AssertionError("no member answers")


class Writer:
    """Counts up in a key without pause and remembers what the store promised to have, and how long each call took."""

    def __init__(self, store: EtcdKeyValueStore, key: str) -> None:
        self.promised, self.failed, self.longest_s = 0, 0, 0.0
        self._store, self._key = store, key
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            number, started = number + 1, time.monotonic()
            try:
                self._store.put(self._key, str(number))
                self.promised = number
            except StoreUnavailableError:
                self.failed += 1
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            time.sleep(0.005)

    def progress(self, count: int = 20) -> None:
        start = self.promised
        wait_until(lambda: self.promised >= start + count, "the writer makes progress", 15)

    def end(self) -> int:
        self._ended.set()
        self._thread.join(10)
        return self.promised


@pytest.mark.parametrize(
    ("number", "victim"), [(signal.SIGKILL, "leader"), (signal.SIGSTOP, "leader"), (signal.SIGSTOP, "ours")]
)
def test_nothing_is_lost_with_one_member(
    cluster: EtcdCluster, connect: Callable[..., EtcdKeyValueStore], prefix: str, number: signal.Signals, victim: str
) -> None:
    renewed: list[int] = []
    sessions = [Session(connect(), TTL_S, renewed.append) for _ in range(2)]
    for session in sessions:
        session.start()
    ours, theirs = (
        Election(connect(), prefix + "root", each, f"machine-{i}", str(i)) for i, each in enumerate(sessions)
    )
    revision = ours.campaign()
    assert revision is not None
    seen: dict[str, str | None] = {}

    def remember(changes: Sequence[KeyChange]) -> None:
        seen.update({change.key: change.now and change.now.value for change in changes})

    watch = connect().watch_prefix(prefix, remember)  # nobody calls this store: its probe must notice
    writer = Writer(connect(), prefix + "count")
    writer.progress()
    struck = leader(cluster)
    if victim == "ours":  # every store speaks to the first member first; here it is no leader
        struck = 0
    pid = cluster.pids[struck]
    os.kill(pid, number)
    before = time.monotonic()
    writer.progress()
    wait_until(lambda: int(seen[prefix + "count"] or 0) > writer.promised - 20, "the watch goes on", 15)
    while time.monotonic() - before < TTL_S + 1.0:  # every lease would have ended by now, had it not been renewed
        assert theirs.campaign() is None
        time.sleep(0.1)
    assert ours.put(prefix + "order", "1", revision), "the leadership is still the same"
    os.kill(pid, signal.SIGCONT) if number is signal.SIGSTOP else wait_until(cluster.keep_alive, "a member starts")
    writer.progress()
    last = writer.end()
    assert connect().get(prefix + "count").value in {str(last), str(last + 1)}
    assert writer.longest_s < TIMEOUT_S + 1.0
    assert not renewed, "no lease was lost"
    wait_until(lambda: seen.get(prefix + "order") == "1", "the watch goes on")
    print(f"{victim} {number.name}: longest call {writer.longest_s:.2f} s, {writer.failed} calls failed, {last} stored")
    watch.close()
    for session in sessions:
        session.close()


def test_without_a_majority_calls_fail_in_time_and_everything_comes_back(
    cluster: EtcdCluster, connect: Callable[..., EtcdKeyValueStore], prefix: str
) -> None:
    store, lost = connect(), threading.Event()
    session = Session(store, TTL_S, lambda _: lost.set())
    session.start()
    store.put(prefix + "kept", "1")
    for pid in cluster.pids[1:]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(cluster.pids) == 1, "two members are dead")
    for call in (lambda: store.put(prefix + "kept", "2"), lambda: store.get(prefix + "kept")):
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            call()
        assert time.monotonic() - started < TIMEOUT_S + 0.5
    wait_until(lambda: len(cluster.keep_alive()) + len(cluster.pids) >= 3, "the members start")

    def readable() -> bool:
        with contextlib.suppress(StoreUnavailableError):
            return store.get(prefix + "kept") is not None
        return False

    wait_until(readable, "a majority is back", 15)
    assert store.get(prefix + "kept").value in "12", "a call without an answer may have had its effect"
    store.put(prefix + "kept", "3")
    assert store.get(prefix + "kept").value == "3"
    wait_until(lambda: store.keep_alive(session.lease) or lost.is_set(), "the session has a lease", 15)
    session.close()


def test_a_write_that_hung_in_a_paused_member_is_void_after_the_next(
    cluster: EtcdCluster, connect: Callable[..., EtcdKeyValueStore], prefix: str
) -> None:
    keys = [f"{prefix}{index}" for index in range(40)]
    paused = leader(cluster)  # it has to forward nothing: what it reads when it wakes up it proposes at once
    hung = connect(cluster.endpoint.split(",")[paused], timeout_s=0.5)
    others = connect(",".join(each for i, each in enumerate(cluster.endpoint.split(",")) if i != paused), timeout_s=5)
    for key in keys:
        hung.put(key, "before")
    pid = cluster.pids[paused]

    def forgotten(key: str) -> bool:
        try:
            hung.put(key, "forgotten")
        except StoreUnavailableError:
            return True
        return False

    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(len(keys)) as pool:
        assert all(pool.map(forgotten, keys))
    for key in keys:
        others.put(key, "after")
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: _answers(hung, keys[0]), "the member is awake", 15)
    time.sleep(0.3)
    assert [others.get(key).value for key in keys] == ["after"] * len(keys)


def _answers(store: EtcdKeyValueStore, key: str) -> bool:
    with contextlib.suppress(StoreUnavailableError):
        return store.get(key) is not None
    return False


def test_dead_members_are_told_apart(cluster: EtcdCluster, tmp_path: Path) -> None:
    listed = (tmp_path / "etcd" / "pids.json").read_text()
    assert listed == str(cluster.pids)
    os.kill(cluster.pids[1], signal.SIGKILL)
    wait_until(lambda: len(cluster.pids) == 2, "a member is dead")
    wait_until(cluster.keep_alive, "a member starts")
    assert len(cluster.pids) == 3
    assert (tmp_path / "etcd" / "pids.json").read_text() == str(cluster.pids) != listed


def test_what_a_cluster_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="1 or 3, got 2"):
        EtcdCluster(tmp_path, members=2)
    with pytest.raises(ConfigurationError, match=r"cannot listen at 192\.0\.2\.1"):
        EtcdCluster(tmp_path, host="192.0.2.1").start()
