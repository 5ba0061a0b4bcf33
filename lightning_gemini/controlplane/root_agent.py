"""The thread that runs the root on whichever agent is elected."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lightning_gemini.controlplane.election import Election
from lightning_gemini.controlplane.events import EventLog
from lightning_gemini.controlplane.failure import Failure
from lightning_gemini.controlplane.kv.base import KeyChange, KeyValueStore, StoreUnavailableError
from lightning_gemini.controlplane.membership import (
    Assignment,
    JobKeys,
    assignment_from_json,
    member_from_json,
    spare_from_json,
)
from lightning_gemini.controlplane.orders import (
    Order,
    order_from_json,
    order_to_json,
    outcome_from_json,
    report_from_json,
)
from lightning_gemini.controlplane.root import Phase, RootState, rebuild, step
from lightning_gemini.controlplane.root_events import (
    Action,
    Announce,
    Assign,
    Assigned,
    Event,
    Evicted,
    Finish,
    GiveUp,
    JobEnded,
    JobShape,
    MemberJoined,
    MemberLost,
    PutOrder,
    Reported,
    SpareJoined,
    SpareLost,
    Tick,
    WorkersEnded,
)
from lightning_gemini.core.recovery import fetch_to_json, version_to_json

_log = logging.getLogger(__name__)
_TICK_S = 0.2
_CAMPAIGN_S = 2.0  # also without a sign that the root is gone
_GRACE_S = 5.0  # for members to come back after the store was away


class LeadershipLostError(Exception):
    """Another agent is root now."""


class RootAgent:
    """Campaigns, and while elected turns the store's changes into events and the root's actions into guarded writes.

    Args:
        store: The key-value store.
        keys: The job's keys.
        shape: The job's shape.
        election: This agent's candidacy.
        events: The job's event log; its owner replaces it as it learns its slot.
    """

    def __init__(
        self, store: KeyValueStore, keys: JobKeys, shape: JobShape, election: Election, events: EventLog
    ) -> None:
        self._store, self._keys, self._shape = store, keys, shape
        self._election, self.events = election, events
        self._changes: queue.SimpleQueue[Sequence[KeyChange]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="root", daemon=True)
        self._vacant = threading.Event()
        self._revision = 0
        self.leads = False

    def start(self) -> None:
        """Starts to campaign."""
        self._thread.start()

    def close(self) -> None:
        """Stops; the session's end gives the leadership up."""
        self._closed.set()
        self._vacant.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def campaign(self) -> None:
        """There is no root, as far as this agent sees: tries to become it now."""
        self._vacant.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._vacant.wait(_CAMPAIGN_S)
            self._vacant.clear()
            try:
                revision = self._election.campaign()
                if revision is not None:
                    self._lead(revision)
            except StoreUnavailableError as error:
                _log.info("the root cannot reach the key-value store: %s", error)
            except LeadershipLostError:
                _log.warning("this agent is no longer root")
            except Exception:
                _log.exception("the root failed; the next one takes over")
            finally:
                self.leads = False

    def _lead(self, revision: int) -> None:
        self._revision, self.leads = revision, True
        _log.info("this agent is root (revision %d)", revision)
        self._changes = queue.SimpleQueue()
        watch = self._store.watch_prefix(self._keys.prefix, self._changes.put)
        try:
            state = self._take_over()
            while not self._closed.is_set():
                for event in self._next_events():
                    state = self._apply(*step(state, event))
        finally:
            watch.close()

    def _take_over(self) -> RootState:
        """Waits for the watch's first delivery, everything in the store, and rebuilds the root's knowledge from it."""
        stored = {change.key: change.now.value for change in self._first_changes() if change.now is not None}
        if self._keys.result in stored:
            return RootState(self._shape, Phase.DONE)
        order = order_from_json(stored[self._keys.order]) if self._keys.order in stored else None
        now = time.time()
        absent = [m.machine for m in order.members if self._keys.member(m.machine) not in stored] if order else []
        decided = [event for key, value in sorted(stored.items()) for event in self._decisions(key, value, now)]
        losses = [MemberLost(slot, now, self._grace_s()) for slot in absent]
        found = [event for key, value in sorted(stored.items()) for event in self._events_of(key, value, now)]
        return self._apply(*rebuild(self._shape, order, [*decided, *losses, *found], now))

    def _grace_s(self) -> float:
        """When this agent lost its lease to the store's absence, so did others, and they are about to come back."""
        return _GRACE_S if self._election.session.troubled_lately() else 0.0

    def _first_changes(self) -> Sequence[KeyChange]:
        while not self._closed.is_set():
            try:
                return self._changes.get(timeout=_TICK_S)
            except queue.Empty:
                continue
        return ()

    def _next_events(self) -> Iterator[Event]:
        try:
            changes = self._changes.get(timeout=_TICK_S)
        except queue.Empty:
            yield Tick(time.time())
            return
        for change in changes:
            self._check_leadership(change)
            yield from self._events_of(change.key, None if change.now is None else change.now.value, time.time())
        yield Tick(time.time())

    def _check_leadership(self, change: KeyChange) -> None:
        if change.key == self._keys.root and (change.now is None or change.now.create_revision != self._revision):
            raise LeadershipLostError

    def _decisions(self, key: str, value: str, now: float) -> Iterator[Event]:
        """Reads what earlier roots decided besides the order."""
        kind, name = self._keys.split(key)
        if kind == "assign" and (assignment := assignment_from_json(value)) is not None:
            yield Assigned(int(name), assignment, now)
        elif kind == "replace" and (wish := json.loads(value))["evict"]:
            yield Evicted(int(name), wish["incarnation"], now)

    def _events_of(self, key: str, value: str | None, now: float) -> Iterator[Event]:
        kind, name = self._keys.split(key)
        if kind == "members":
            lost = MemberLost(int(name), now, self._grace_s())
            yield lost if value is None else MemberJoined(member_from_json(value), now)
        elif kind == "spares":
            yield SpareLost(name, now) if value is None else SpareJoined(spare_from_json(value), now)
        elif kind == "reports" and value is not None:
            yield Reported(report_from_json(value), now)
        elif kind == "outcomes" and value is not None:
            yield WorkersEnded(outcome_from_json(value), now)
        elif kind == "result" and value is not None:
            yield JobEnded(now)

    def _apply(self, state: RootState, actions: Sequence[Action]) -> RootState:
        for action in actions:
            match action:
                case PutOrder(order):
                    self._put(self._keys.order, order_to_json(order))
                case Assign(slot, assignment):
                    self._assign(slot, assignment)
                case GiveUp():
                    self._give_up(action)
                case Announce(order, failure):
                    self._announce(order, failure)
                case Finish(success, reason, failure):
                    self._put(self._keys.result, json.dumps({"success": success, "reason": reason}))
                    self._announce_failure(failure)
        return state

    def _assign(self, slot: int, assignment: Assignment | None) -> None:
        self._put(self._keys.assignment(slot), json.dumps({} if assignment is None else asdict(assignment)))
        if assignment is not None:
            _log.info("%s takes node %d", assignment.name, slot)

    def _give_up(self, action: GiveUp) -> None:
        why = "answers no order although it lives" if action.evict else "is lost"
        _log.warning("node %d (%s) %s", action.slot, action.name, why)
        wish = {"name": action.name, "incarnation": action.incarnation, "evict": action.evict}
        self._put(self._keys.replace(action.slot), json.dumps(wish))

    def _put(self, key: str, value: str) -> None:
        """Writes as root; keeps trying while the store is away, for the state has already moved on.

        Raises:
            LeadershipLostError: Nothing was written, so that nothing may follow from it: another one leads, or this
                agent is about to end, most often because another has its slot.
        """
        while not self._closed.is_set():
            try:
                if self._election.put(key, value, self._revision):
                    return
                break
            except StoreUnavailableError:
                self._closed.wait(_TICK_S)
        raise LeadershipLostError

    def _announce(self, order: Order, failure: Failure | None) -> None:
        self._announce_failure(failure)
        plan = order.plan
        assert plan is not None
        shown: dict[str, Any] = {
            "id": None if plan.id is None else version_to_json(plan.id),
            "tiers": [tier.value for tier in plan.tiers],
            "fetches": [fetch_to_json(fetch) for fetch in plan.fetches],
        }
        members = [member.machine for member in order.members]
        self.events.append("generation_started", generation=order.generation, members=members, plan=shown)

    def _announce_failure(self, failure: Failure | None) -> None:
        if failure is None:
            return
        _log.info("%s failure in generation %d: %s", failure.kind, failure.generation, failure.detail)
        fields = {"kind": failure.kind, "detail": failure.detail, "nodes_lost": list(failure.nodes_lost)}
        about = {"time": failure.time, "node": failure.node, "generation": failure.generation}
        self.events.append("failure_detected", **about, **fields)
