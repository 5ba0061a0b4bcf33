"""The contract of a key-value store, on a real etcd of one member and of three."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_gemini.controlplane.election import Election
from lightning_gemini.controlplane.kv.base import KeyChange, StoreUnavailableError
from lightning_gemini.controlplane.kv.cluster import EtcdCluster
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore, reachable
from lightning_gemini.controlplane.membership import JobKeys, Member, Registration
from lightning_gemini.controlplane.processes import PROTOBUF_VARIABLE
from lightning_gemini.controlplane.session import Session
from lightning_gemini.errors import ConfigurationError
from tests.controlplane.lossy_proxy import LossyProxy


@pytest.fixture(scope="module", params=[1, 3])
def etcd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(tmp_path_factory.mktemp("etcd"), members=request.param)
    cluster.start()
    assert len(cluster.pids) == request.param
    yield cluster
    cluster.close()


def wait_until(condition, timeout_s: float = 6.0) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "not in time"
        time.sleep(0.02)
    return time.monotonic() - started


def test_values_are_put_read_and_deleted(store: EtcdKeyValueStore, prefix: str) -> None:
    store.put(prefix + "a", "1")
    store.put(prefix + "b", "ü")
    assert [(kv.key, kv.value) for kv in store.get_prefix(prefix)] == [(prefix + "a", "1"), (prefix + "b", "ü")]
    assert store.delete(prefix + "a")
    assert not store.delete(prefix + "a")
    assert store.get(prefix + "a") is None


def test_only_the_first_creates_a_key(store: EtcdKeyValueStore, prefix: str) -> None:
    revision = store.put_if_absent(prefix + "root", "one")
    assert store.put_if_absent(prefix + "root", "two") is None
    kept = store.get(prefix + "root")
    assert kept is not None
    assert (kept.value, kept.create_revision) == ("one", revision)


def test_a_guarded_put_fails_once_the_guard_was_created_anew(store: EtcdKeyValueStore, prefix: str) -> None:
    revision = store.put_if_absent(prefix + "root", "one")
    assert revision is not None
    assert store.put_guarded(prefix + "order", "1", prefix + "root", revision)
    store.delete(prefix + "root")
    assert not store.put_guarded(prefix + "order", "2", prefix + "root", revision)
    store.put_if_absent(prefix + "root", "one")
    assert not store.put_guarded(prefix + "order", "3", prefix + "root", revision)
    assert store.get(prefix + "order").value == "1"  # type: ignore[union-attr]


def test_a_silent_lease_ends_within_seconds_and_takes_its_keys_along(store: EtcdKeyValueStore, prefix: str) -> None:
    lease = store.grant(2)
    store.put(prefix + "member", "1", lease)
    time.sleep(1)
    assert store.keep_alive(lease)
    assert store.get(prefix + "member") is not None
    assert 1.0 < wait_until(lambda: store.get(prefix + "member") is None) < 4.0
    assert not store.keep_alive(lease)


def test_a_watch_reports_what_is_there_and_then_every_change(store: EtcdKeyValueStore, prefix: str) -> None:
    store.put(prefix + "a", "1")
    seen: queue.SimpleQueue[list[KeyChange]] = queue.SimpleQueue()
    watch = store.watch_prefix(prefix, lambda changes: seen.put(list(changes)))
    assert [(c.key, c.now.value) for c in seen.get(timeout=5) if c.now] == [(prefix + "a", "1")]
    store.put(prefix + "b", "2")
    store.delete(prefix + "a")
    found = seen.get(timeout=5)
    while len(found) < 2:
        found += seen.get(timeout=5)
    assert [(c.key, c.now and c.now.value) for c in found] == [(prefix + "b", "2"), (prefix + "a", None)]
    watch.close()
    store.put(prefix + "c", "3")
    with pytest.raises(queue.Empty):
        seen.get(timeout=0.3)


def test_a_call_whose_answer_was_lost_is_told_the_truth(
    store: EtcdKeyValueStore, etcd: EtcdCluster, prefix: str
) -> None:
    last = etcd.endpoint.split(",")[-1]
    with LossyProxy(last) as proxy:
        client = EtcdKeyValueStore(f"{proxy.endpoint},{last}", timeout_s=1.0)
        lease = client.grant(5)
        client.put(prefix + "order", "1")
        proxy.losing.set()
        revision = client.put_if_absent(prefix + "root", "one", lease)
        assert proxy.lost_bytes, "the first attempt took place, unheard"
        kept = store.get(prefix + "root")
        assert kept is not None
        assert kept.create_revision == revision, "the caller knows that it was the first"
        client.close()
        lost, client = proxy.lost_bytes, EtcdKeyValueStore(f"{proxy.endpoint},{last}", timeout_s=1.0)
        proxy.losing.clear()
        client.get(prefix + "order")
        proxy.losing.set()
        assert client.put_guarded(prefix + "order", "2", prefix + "root", kept.create_revision)
        assert proxy.lost_bytes > lost
        assert store.get(prefix + "order").value == "2"  # type: ignore[union-attr]
        client.close()


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(tmp_path)
    cluster.start()
    endpoint = cluster.endpoint
    yield cluster
    cluster.close()
    assert reachable(endpoint, timeout_s=0.3) is not None
    assert not (tmp_path / "data").exists()


def test_a_watch_catches_up_after_etcd_was_killed(own_etcd: EtcdCluster, prefix: str) -> None:
    store = EtcdKeyValueStore(own_etcd.endpoint)
    state: dict[str, str | None] = {}
    watch = store.watch_prefix(prefix, lambda changes: state.update({c.key: c.now and c.now.value for c in changes}))
    store.put(prefix + "a", "1")
    store.put(prefix + "b", "1")
    wait_until(lambda: len(state) == 2)
    (pid,) = own_etcd.pids
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not own_etcd.pids)
    with pytest.raises(StoreUnavailableError):
        store.put(prefix + "a", "2")
    wait_until(own_etcd.keep_alive)
    assert own_etcd.pids != [pid]
    wait_until(lambda: reachable(own_etcd.endpoint, 0.5) is None)
    other = EtcdKeyValueStore(own_etcd.endpoint)
    other.put(prefix + "a", "3")
    other.delete(prefix + "b")
    wait_until(lambda: state == {prefix + "a": "3", prefix + "b": None}, 10)
    watch.close()
    store.close()
    other.close()


def test_calls_on_a_hung_etcd_are_bounded(own_etcd: EtcdCluster, prefix: str) -> None:
    store = EtcdKeyValueStore(own_etcd.endpoint, timeout_s=0.5)
    store.put(prefix + "a", "1")
    (pid,) = own_etcd.pids
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            store.put(prefix + "a", "2")
        assert time.monotonic() - started < 2
    finally:
        os.kill(pid, signal.SIGCONT)
    store.close()


def test_a_session_replaces_a_lost_lease_and_says_so(store: EtcdKeyValueStore) -> None:
    renewed: list[int] = []
    session = Session(store, 2, renewed.append)
    session.start()
    first = session.lease
    assert not session.troubled_lately()
    store.revoke(first)
    wait_until(lambda: bool(renewed))
    assert session.troubled_lately()
    assert session.lease == renewed[0] != first
    session.close()
    assert not store.keep_alive(session.lease)


def test_one_candidate_leads_and_its_successor_fences_it(store: EtcdKeyValueStore, prefix: str) -> None:
    sessions = [Session(store, 2, lambda _: None) for _ in range(2)]
    for session in sessions:
        session.start()
    first, second = (Election(store, prefix + "root", s, f"machine-{i}", str(i)) for i, s in enumerate(sessions))
    revision = first.campaign()
    assert revision is not None
    assert first.campaign() == revision
    assert second.campaign() is None
    assert first.put(prefix + "order", "1", revision)
    sessions[0].close()
    successor = second.campaign()
    assert successor is not None
    assert successor > revision
    assert not first.put(prefix + "order", "2", revision)
    assert store.get(prefix + "order").value == "1"  # type: ignore[union-attr]
    sessions[1].close()


def test_a_slot_belongs_to_one_incarnation(store: EtcdKeyValueStore) -> None:
    keys = JobKeys(os.urandom(4).hex())
    old, new = (Registration(store, keys.member(0), Member(0, "h", 1, 2, name)) for name in ("old", "new"))
    leases = [store.grant(5) for _ in range(3)]
    assert old.register(leases[0])
    assert not new.register(leases[1])
    assert old.register(leases[2]), "the same agent may come back with a new lease"
    store.revoke(leases[0])
    assert store.get(keys.member(0)) is not None
    store.revoke(leases[2])
    assert new.register(leases[1])
    assert keys.split(keys.member(0)) == ("members", "0")
    assert keys.split(keys.order) == ("order", "")


def test_the_variable_that_etcd3_needs_does_not_leak() -> None:
    assert PROTOBUF_VARIABLE not in os.environ


@pytest.mark.parametrize("endpoint", ["localhost", ":2379", "host:port", "a:1,b", "a:1,"])
def test_endpoints_are_checked(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        EtcdKeyValueStore(endpoint)
