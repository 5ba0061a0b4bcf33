"""The thread that runs the root, on a real etcd that goes away at the wrong moment."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from lightning_gemini.controlplane.election import Election
from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog, read_events
from lightning_gemini.controlplane.kv.base import StoreUnavailableError
from lightning_gemini.controlplane.kv.cluster import EtcdCluster
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore
from lightning_gemini.controlplane.membership import JobKeys, Registration
from lightning_gemini.controlplane.orders import START, answer_to_json, order_from_json
from lightning_gemini.controlplane.root_agent import RootAgent
from lightning_gemini.controlplane.root_events import JobShape
from lightning_gemini.controlplane.session import Session
from tests.controlplane.root_world import member, report
from tests.dataplane.waiting import wait_until

pytestmark = pytest.mark.timeout(60)


class ShyStore(EtcdKeyValueStore):
    """Does not answer to an order that starts a generation."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.asked = threading.Event()

    def put_guarded(self, key: str, value: str, guard: str, guard_revision: int) -> bool:
        if key.endswith("/order") and order_from_json(value).phase == START:
            self.asked.set()
            raise StoreUnavailableError("the store is away")
        return super().put_guarded(key, value, guard, guard_revision)


def test_a_generation_is_announced_only_by_the_root_whose_order_is_stored(
    etcd: EtcdCluster, store: EtcdKeyValueStore, tmp_path: Path
) -> None:
    keys, log = JobKeys(f"job-{time.time_ns()}"), EventLog(tmp_path / EVENTS_FILE)

    def started() -> list[int]:
        events = read_events(tmp_path / EVENTS_FILE)
        return [event["generation"] for event in events if event["event"] == "generation_started"]

    def agent(its_store: EtcdKeyValueStore, name: str) -> tuple[Session, RootAgent]:
        session = Session(its_store, 5, lambda lease: None)
        session.start()
        root = RootAgent(its_store, keys, JobShape(1, 1, 3), Election(its_store, keys.root, session, name, name), log)
        root.start()
        root.campaign()
        return session, root

    lease, shy = store.grant(60), ShyStore(etcd.endpoint)
    with contextlib.ExitStack() as stack:
        for undo in (shy.close, lambda: store.revoke(lease)):
            stack.callback(undo)
        assert Registration(store, keys.member(0), member(0)).register(lease)
        session, root = agent(shy, "first")
        stack.callback(session.close)
        stack.callback(root.close)
        wait_until(lambda: store.get(keys.order), "the order to report")
        store.put(keys.report(0), answer_to_json(report(0, 1)), lease)
        assert shy.asked.wait(10)
        root.close()  # it is told that its slot is another's while it insists on its order
        session.close()
        assert started() == []
        session, root = agent(store, "second")
        stack.callback(session.close)
        stack.callback(root.close)
        wait_until(started, "the start")
    assert started() == [1]
