"""The worker agent: joins the machine's memory, its workers and the cluster; one runs on each machine."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lightning_gemini.controlplane.agent import AgentSettings, MachineAgent
from lightning_gemini.controlplane.agent_settings import EXIT_FENCED, WorkerAgentSettings
from lightning_gemini.controlplane.candidacy import Candidacy
from lightning_gemini.controlplane.election import Election
from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog
from lightning_gemini.controlplane.job_view import JobView
from lightning_gemini.controlplane.kv.base import KeyChange, KeyValueStore, StoreUnavailableError
from lightning_gemini.controlplane.logs import JsonLinesHandler
from lightning_gemini.controlplane.membership import JobKeys, Member, Registration, Spare, member_from_json
from lightning_gemini.controlplane.orders import order_from_json
from lightning_gemini.controlplane.root_agent import RootAgent
from lightning_gemini.controlplane.root_events import JobShape
from lightning_gemini.controlplane.run_directory import link_slot, unlink_slot
from lightning_gemini.controlplane.session import Session
from lightning_gemini.controlplane.slot_agent import SlotAgent
from lightning_gemini.controlplane.warm_pool import PoolLost, WarmPool, WorkerExit
from lightning_gemini.controlplane.worker_env import PortReservation
from lightning_gemini.errors import AgentError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_RETRY_S = 0.2
_MAX_POOL_LOSSES = 3
_LINGER_S = 10.0  # after the job's end, for the launcher to end this agent


class WorkerAgent:
    """Waits for a slot as a spare, then works on it; everything happens on the thread that calls `run`.

    That must be the process's main thread. The factories are where a simulator puts its own machine.

    Args:
        settings: See `WorkerAgentSettings`.
        store: The key-value store; the caller closes it.
        log: The process's log, told of the slot and of new generations.
        make_memory: Makes the machine's memory, once the slot is known.
        make_pool: Makes the pool of workers; takes what `WarmPool` takes.
        make_port: Makes the reservation of the job's port.
        events: The job's event log; by default that of the run directory.
    """

    def __init__(
        self,
        settings: WorkerAgentSettings,
        store: KeyValueStore,
        log: JsonLinesHandler,
        *,
        make_memory: Callable[[AgentSettings], MachineAgent] = MachineAgent,
        make_pool: Callable[..., WarmPool] = WarmPool,
        make_port: Callable[[], PortReservation] = PortReservation,
        events: EventLog | None = None,
    ) -> None:
        spec = settings.spec
        self.settings, self._store, self._log_handler = settings, store, log
        self.exit_code = 0
        self._keys = JobKeys(settings.job)
        self._view = JobView(self._keys)
        self._events = EventLog(settings.run_dir / EVENTS_FILE) if events is None else events
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pool = make_pool(
            lambda message: self._post(self._from_pool, message),
            preload=spec.preload,
            log_path=settings.run_dir / "logs" / f"{settings.name}-pool.out",
            template=spec.template,
        )
        self._port = make_port()
        self._session = Session(store, spec.lease_ttl_s, lambda _: self._post(self._rejoin))
        shape = JobShape(spec.nodes, spec.nproc_per_node, spec.max_failures, spec.report_timeout_s)
        election = Election(store, self._keys.root, self._session, settings.name, settings.incarnation)
        self._root = RootAgent(store, self._keys, shape, election, self._events)
        spare = Spare(settings.name, settings.host, os.getpid(), settings.incarnation, settings.domain)
        self._registration = Registration(store, self._keys.spare(settings.name), spare)
        self._candidacy = Candidacy(settings, store, spare, make_memory)
        self._duty: SlotAgent | None = None
        self._answers: dict[str, str] = {}  # what this agent last wrote below its lease
        self._stopping = False
        self._leave_at: float | None = None
        self._pool_losses = 0

    def run(self) -> None:
        """Joins the job and works until `stop`; ends workers and frees the memory on every way out."""
        try:
            self._start()
            while (task := self._next_task()) is not None:
                task()
        finally:
            self._close()

    def stop(self) -> None:
        """Ends `run`; safe in a signal handler."""
        self._stopping = True
        self._inbox.put(None)

    def status(self) -> dict[str, Any]:
        """What this agent adds to the machine's status."""
        duty = {} if self._duty is None else self._duty.status()
        return {"name": self.settings.name, **self._view.describe(), "pool_pid": self._pool.pid, **duty}

    def _start(self) -> None:
        self._pool.start()
        self._insist(self._session.start)
        self._events.append("spare_joined", name=self.settings.name, pid=os.getpid(), domain=self.settings.domain)
        self._register_spare()
        self._store.watch_prefix(self._keys.prefix, lambda changes: self._post(self._read, changes))
        self._root.start()

    def _close(self) -> None:
        self._pool.close()
        self._candidacy.close()
        if self._duty is not None:
            self._duty.memory.close()
            unlink_slot(self.settings.run_dir, self.settings.job, self._duty.slot, self.settings.socket_path)
        self._root.close()
        self._session.close()
        self._port.close()

    def _next_task(self) -> Callable[[], None] | None:
        timeout = None if self._leave_at is None else max(0.0, self._leave_at - time.monotonic())
        try:
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def _post(self, task: Callable[..., None], *args: Any) -> None:
        self._inbox.put(lambda: task(*args))

    def _insist(self, attempt: Callable[[], _T]) -> _T | None:
        """Tries until the store answers; None when told to end before it did."""
        told = False
        while not self._stopping:
            try:
                return attempt()
            except StoreUnavailableError as error:
                if not told:
                    _log.warning("cannot reach the key-value store, trying again: %s", error)
                told = True
                time.sleep(_RETRY_S)
        return None

    # -- as a spare --------------------------------------------------------------------------------------------------

    def _register_spare(self) -> None:
        """The lease of a predecessor of the same name may have to end first."""
        deadline = time.monotonic() + 5 * self.settings.spec.lease_ttl_s
        while self._insist(lambda: self._registration.register(self._session.lease)) is False:
            if time.monotonic() > deadline:
                raise AgentError(
                    f"another agent of job {self.settings.job} calls itself {self.settings.name}: "
                    "stop it, or give this one another --name"
                )
            time.sleep(_RETRY_S)

    def _seek_slot(self) -> None:
        seat = self._candidacy.seek(
            self._view, lambda registration: self._insist(lambda: registration.register(self._session.lease))
        )
        if seat is not None:
            self._registration = seat.registration
            self._become_member(seat.slot, seat.memory)

    def _become_member(self, slot: int, memory: MachineAgent) -> None:
        settings = self.settings
        self._events = self._root.events = replace(self._events, node=slot)
        self._log_handler.node = slot
        self._log_handler.path = settings.run_dir / "logs" / f"node{slot}-agent.jsonl"
        self._duty = SlotAgent(settings, slot, memory, self._pool, self._port, events=self._events, answer=self._answer)
        memory.on_fatal = lambda rank, message: self._post(self._refused, rank, message)
        memory.status_extra = self.status
        threading.Thread(target=self._follow, args=(memory,), name="closed", daemon=True).start()
        link_slot(settings.run_dir, settings.job, slot, settings.socket_path)
        self._insist(lambda: self._store.delete(self._keys.spare(settings.name)))
        _log.info("%s (pid %d) has node %d", settings.name, os.getpid(), slot)
        self._events.append("member_joined", name=settings.name, pid=os.getpid(), domain=settings.domain)

    def _follow(self, memory: MachineAgent) -> None:
        """A ``stop`` request on the socket closes the memory: the whole agent goes with it."""
        memory.closed.wait()
        self.stop()

    # -- membership --------------------------------------------------------------------------------------------------

    def _rejoin(self) -> None:
        """After a lost lease: takes its place again and writes what vanished with the old lease."""
        if self._duty is None:
            self._register_spare()
        elif self._insist(lambda: self._registration.register(self._session.lease)) is False:
            self._leave("was not heard for so long that another machine has its slot")
        else:
            for key, value in self._answers.items():
                self._answer(key, value)

    def _leave(self, why: str) -> None:
        """Fences this agent off: what it holds is of no use any more, and must not be taken for the job's."""
        _log.error("%s %s; it ends", self.settings.name, why)
        self.exit_code = EXIT_FENCED
        self.stop()

    def _answer(self, key: str, value: str) -> None:
        """Writes below this agent's lease; keeps trying while the store is away, until told to end."""
        self._answers[key] = value
        self._insist(lambda: self._store.put(key, value, self._session.lease))

    def _read(self, changes: Sequence[KeyChange]) -> None:
        for change in changes:
            self._view.take(change)
            kind, _ = self._keys.split(change.key)
            if kind == "order" and change.now is not None:
                self._obey(change.now.value)
            elif kind == "replace" and change.now is not None:
                self._heed_eviction(change.now.value)
        if self._view.result is not None and self._leave_at is None:
            self._leave_at = time.monotonic() + _LINGER_S
        self._check_slot()
        # Spares leave the root to members where there are any, or will be at once.
        if self._view.root_name is None and (self._duty is not None or not self._view.ordered):
            self._root.campaign()

    def _check_slot(self) -> None:
        if self._duty is None:
            self._seek_slot()
            return
        if self._held_by_another(self._view.members.get(self._duty.slot)):
            # The watch may still tell of a holder that came and went before this agent took the slot.
            now = self._insist(lambda: self._store.get(self._registration.key))
            if now is not None and self._held_by_another(holder := member_from_json(now.value)):
                self._leave(f"lost its slot to {holder.name}")

    def _held_by_another(self, holder: Member | None) -> bool:
        return holder is not None and holder.incarnation != self.settings.incarnation

    def _heed_eviction(self, text: str) -> None:
        wish = json.loads(text)
        if wish["evict"] and wish["incarnation"] == self.settings.incarnation:
            self._leave("did not answer for so long that the root gave it up")

    def _obey(self, text: str) -> None:
        order = order_from_json(text)
        if self._duty is not None and self._duty.obey(order):
            self._events = self._root.events = self._duty.events

    # -- workers -----------------------------------------------------------------------------------------------------

    def _from_pool(self, message: WorkerExit | PoolLost | dict[str, Any]) -> None:
        if isinstance(message, PoolLost):
            self._pool_ended(message)
        elif isinstance(message, WorkerExit):
            self._worker_ended(message)
        elif message["event"] == "started":
            if self._duty is not None:
                self._duty.worker_started(message["token"], message["pid"])
        else:
            self._pool_losses = 0
            for warning in message["warnings"]:
                _log.warning("%s", warning)
            _log.info("warm pool ready after %.1f s", message["seconds"])

    def _worker_ended(self, leave: WorkerExit) -> None:
        if self._duty is not None:
            self._duty.worker_ended(leave)

    def _pool_ended(self, loss: PoolLost) -> None:
        self._pool_losses += 1
        if self._pool_losses > _MAX_POOL_LOSSES:
            raise AgentError(f"the warm pool ended {self._pool_losses} times before it was ready: see its log")
        _log.error("the warm pool was lost, with %d workers; starting another", len(loss.exits))
        self._pool.start()
        for leave in loss.exits:
            self._worker_ended(leave)

    def _refused(self, rank: int, message: str) -> None:
        if self._duty is not None:
            self._duty.worker_refused(rank, message)
