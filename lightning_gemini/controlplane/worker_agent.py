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
from typing import Any

from lightning_gemini.controlplane.agent import AgentSettings, MachineAgent
from lightning_gemini.controlplane.agent_settings import WorkerAgentSettings
from lightning_gemini.controlplane.election import Election
from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog
from lightning_gemini.controlplane.kv.base import KeyChange, KeyValueStore, StoreUnavailableError
from lightning_gemini.controlplane.logs import JsonLinesHandler
from lightning_gemini.controlplane.membership import JobKeys, Member, Membership
from lightning_gemini.controlplane.orders import (
    START,
    Order,
    Outcome,
    Report,
    answer_to_json,
    order_from_json,
)
from lightning_gemini.controlplane.root_agent import RootAgent
from lightning_gemini.controlplane.root_events import JobShape
from lightning_gemini.controlplane.session import Session
from lightning_gemini.controlplane.warm_pool import PoolLost, WarmPool, WorkerCommand, WorkerExit
from lightning_gemini.controlplane.worker_env import PortReservation, WorkerPlace
from lightning_gemini.controlplane.worker_group import WorkerGroup, describe_exit
from lightning_gemini.core.recovery import Fetch, RecoveryPlan, fetch_to_json
from lightning_gemini.errors import AgentError, GeminiError

_log = logging.getLogger(__name__)
_RETRY_S = 0.2
_MAX_POOL_LOSSES = 3


class WorkerAgent:
    """Obeys the root's orders; everything happens on the thread that calls `run`, the process's main thread.

    Args:
        settings: See `WorkerAgentSettings`.
        store: The key-value store; the caller closes it.
        log: The process's log, told of new generations.
    """

    def __init__(self, settings: WorkerAgentSettings, store: KeyValueStore, log: JsonLinesHandler) -> None:
        self.settings, self._store, self._log_handler = settings, store, log
        self._keys = JobKeys(settings.job)
        self._events = EventLog(settings.run_dir / EVENTS_FILE, node=settings.machine)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._memory = MachineAgent(
            AgentSettings(
                job=settings.job,
                machine=settings.machine,
                socket_path=settings.socket_path,
                secret=settings.secret,
                bind_host=settings.host,
                run_dir=settings.run_dir,
            )
        )
        self._memory.on_fatal = lambda rank, message: self._post(self._worker_refused, rank, message)
        self._memory.status_extra = self.status
        self._pool = WarmPool(
            lambda message: self._post(self._from_pool, message),
            preload=settings.preload,
            log_path=settings.run_dir / "logs" / f"node{settings.machine}-pool.out",
            template=settings.template,
        )
        self._session = Session(store, settings.lease_ttl_s, lambda _: self._post(self._rejoin))
        shape = JobShape(settings.nodes, settings.nproc_per_node, settings.max_failures)
        election = Election(store, self._keys.root, self._session, settings.machine, settings.incarnation)
        self._root = RootAgent(store, self._keys, shape, election, self._events)
        self._membership: Membership | None = None
        self._port = PortReservation()
        self._order: Order | None = None
        self._root_machine: int | None = None
        self._workers = WorkerGroup(Outcome(settings.machine, 0, settings.incarnation))
        self._answers: dict[str, str] = {}  # what this agent last wrote below its lease
        self._stopping = False
        self._pool_losses = 0

    def run(self) -> None:
        """Joins the job and works until `stop`; ends workers and frees the memory on every way out."""
        try:
            self._start()
            while (task := self._inbox.get()) is not None:
                task()
        finally:
            self._close()

    def stop(self) -> None:
        """Ends `run`; safe in a signal handler."""
        self._stopping = True
        self._inbox.put(None)

    def status(self) -> dict[str, Any]:
        """What this agent adds to the machine's status."""
        order = self._order
        return {
            "root": self._root_machine,
            "generation": 0 if order is None else order.generation,
            "phase": None if order is None else order.phase,
            "pool_pid": self._pool.pid,
            "workers": self._workers.describe(self._pool.workers()),
        }

    def _start(self) -> None:
        self._pool.start()
        self._memory.start()
        threading.Thread(target=self._follow_memory, name="closed", daemon=True).start()
        self._session.start()
        host, port = self._memory.replica_address
        member = Member(self.settings.machine, host, port, os.getpid(), self.settings.incarnation)
        self._membership = Membership(self._store, self._keys, member)
        self._join()
        self._events.append("member_joined")
        self._store.watch_prefix(self._keys.prefix, lambda changes: self._post(self._read, changes))
        self._root.start()

    def _close(self) -> None:
        self._root.close()
        self._pool.close()
        self._memory.close()
        self._session.close()
        self._port.close()

    def _post(self, task: Callable[..., None], *args: Any) -> None:
        self._inbox.put(lambda: task(*args))

    def _follow_memory(self) -> None:
        """A ``stop`` request on the socket closes the memory: the whole agent goes with it."""
        self._memory.closed.wait()
        self.stop()

    # -- membership --------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Takes the slot; the lease of a dead predecessor may have to end first."""
        assert self._membership is not None
        deadline = time.monotonic() + 5 * self.settings.lease_ttl_s
        while not self._stopping and not self._membership.register(self._session.lease):
            if time.monotonic() > deadline:
                raise AgentError(
                    f"another agent holds slot {self.settings.machine} of job {self.settings.job}: "
                    "stop it, or start this one with another slot"
                )
            time.sleep(_RETRY_S)

    def _rejoin(self) -> None:
        """After a lost lease: takes the slot again and writes what vanished with the old lease."""
        self._join()
        for key, value in self._answers.items():
            self._answer(key, value)

    def _answer(self, key: str, value: str) -> None:
        """Writes below this agent's lease; keeps trying while the store is away, until told to end."""
        self._answers[key] = value
        while not self._stopping:
            try:
                self._store.put(key, value, self._session.lease)
                return
            except StoreUnavailableError as error:
                _log.warning("cannot reach the key-value store, trying again: %s", error)
                time.sleep(_RETRY_S)

    # -- orders ------------------------------------------------------------------------------------------------------

    def _read(self, changes: Sequence[KeyChange]) -> None:
        for change in changes:
            if change.key == self._keys.root:
                self._root_machine = None if change.now is None else int(json.loads(change.now.value)["machine"])
            elif change.key == self._keys.order and change.now is not None:
                self._obey(order_from_json(change.now.value))
        if self._root_machine is None:
            self._root.campaign()

    def _obey(self, order: Order) -> None:
        if self._order is not None and order.rank <= self._order.rank:
            return
        me = {member.machine: member.incarnation for member in order.members}.get(self.settings.machine)
        if me != self.settings.incarnation:
            return  # an order for my predecessor on this slot
        self._order = order
        self._log_handler.generation = order.generation
        self._events = replace(self._events, generation=order.generation)
        if order.phase == START:
            self._start_generation(order)
        else:
            self._report(order)

    def _report(self, order: Order) -> None:
        """Ends the old generation here: no worker, no older replica can change the memory that is reported."""
        exits = self._workers.outcome.exits
        self._workers = WorkerGroup(Outcome(self.settings.machine, order.generation, self.settings.incarnation))
        if not self._pool.kill_workers(self.settings.stop_timeout_s):
            _log.error("workers did not end within %.0f s after SIGKILL", self.settings.stop_timeout_s)
        report = Report(
            machine=self.settings.machine,
            generation=order.generation,
            incarnation=self.settings.incarnation,
            master_port=self._port.renew(),
            memory=self._fence(order),
            exits=exits,
        )
        self._answer(self._keys.report(self.settings.machine), answer_to_json(report))

    def _fence(self, order: Order) -> dict[str, Any]:
        addresses = [(member.host, member.replica_port) for member in order.members]
        try:
            self._memory.set_peers(order.generation, self.settings.nproc_per_node, addresses)
        except GeminiError as error:
            _log.error("this machine's memory does not fit the job: %s", error)
            return {"machine": self.settings.machine, "error": str(error)}
        return self._memory.report()

    def _start_generation(self, order: Order) -> None:
        plan = order.plan
        assert plan is not None
        if plan.id is not None:
            threading.Thread(target=self._retrieve, args=(plan,), name="retrieve", daemon=True).start()
        place = self._place(order)
        tokens = self._workers.expect([place.rank(index) for index in range(self.settings.nproc_per_node)])
        self._pool.launch(
            [
                WorkerCommand(token, self.settings.script, place.environment(index), place.log_path(index))
                for index, token in enumerate(tokens)
            ]
        )

    def _place(self, order: Order) -> WorkerPlace:
        return WorkerPlace(
            job=self.settings.job,
            machine=self.settings.machine,
            nodes=self.settings.nodes,
            nproc_per_node=self.settings.nproc_per_node,
            generation=order.generation,
            max_failures=self.settings.max_failures,
            master_addr=order.members[0].host,
            master_port=order.master_port,
            agent_socket=self.settings.socket_path,
            run_dir=self.settings.run_dir,
        )

    def _retrieve(self, plan: RecoveryPlan) -> None:
        """Fetches what the workers need, while they start; then, in the background, what full replication lacks."""
        events = self._events
        for name, wanted in (("retrieved", plan.fetches), ("refilled", plan.refills)):
            mine = [fetch for fetch in wanted if fetch.target == self.settings.machine]
            if mine:
                self._fetch(events, name, mine)

    def _fetch(self, events: EventLog, name: str, fetches: Sequence[Fetch]) -> None:
        try:
            received, seconds = self._memory.retrieve(fetches)
        except (GeminiError, OSError, KeyError) as error:
            # The workers see what arrived and plan again from that.
            _log.warning("could not fetch %d shards from peers: %s", len(fetches), error)
            return
        shown = [fetch_to_json(fetch) for fetch in fetches]
        events.append(name, fetches=shown, bytes=received, seconds=seconds)

    # -- workers -----------------------------------------------------------------------------------------------------

    def _from_pool(self, message: WorkerExit | PoolLost | dict[str, Any]) -> None:
        if isinstance(message, WorkerExit):
            self._worker_ended(message)
        elif isinstance(message, PoolLost):
            self._pool_ended(message)
        elif message["event"] == "started":
            self._worker_started(message["token"], message["pid"])
        else:
            self._pool_losses = 0
            for warning in message["warnings"]:
                _log.warning("%s", warning)
            _log.info("warm pool ready after %.1f s", message["seconds"])

    def _worker_started(self, token: str, pid: int) -> None:
        pids = self._workers.started(token, pid)
        if pids is not None:
            self._events.append("workers_started", pids=pids)

    def _worker_ended(self, leave: WorkerExit) -> None:
        self._events.append("worker_exit", **describe_exit(leave, expected=leave.token not in self._workers.ranks))
        if self._workers.ended(leave):
            self._put_outcome()

    def _pool_ended(self, loss: PoolLost) -> None:
        self._pool_losses += 1
        if self._pool_losses > _MAX_POOL_LOSSES:
            raise AgentError(f"the warm pool ended {self._pool_losses} times before it was ready: see its log")
        _log.error("the warm pool was lost, with %d workers; starting another", len(loss.exits))
        self._pool.start()
        for leave in loss.exits:
            self._worker_ended(leave)

    def _worker_refused(self, rank: int, message: str) -> None:
        _log.error("rank %d refuses to train: %s", rank, message)
        self._workers.refused(rank, message)
        self._put_outcome()

    def _put_outcome(self) -> None:
        self._answer(self._keys.outcome(self.settings.machine), answer_to_json(self._workers.outcome))
