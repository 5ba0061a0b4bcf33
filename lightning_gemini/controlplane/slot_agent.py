"""What an agent does once it has a slot: it obeys the root's orders with the machine's memory and its workers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_gemini.controlplane.agent import MachineAgent
from lightning_gemini.controlplane.agent_settings import WorkerAgentSettings
from lightning_gemini.controlplane.events import EventLog
from lightning_gemini.controlplane.membership import JobKeys
from lightning_gemini.controlplane.orders import START, Order, Outcome, Report, answer_to_json
from lightning_gemini.controlplane.warm_pool import WarmPool, WorkerCommand, WorkerExit
from lightning_gemini.controlplane.worker_env import PortReservation, WorkerPlace
from lightning_gemini.controlplane.worker_group import WorkerGroup, describe_exit
from lightning_gemini.core.recovery import Fetch, RecoveryPlan, fetch_to_json
from lightning_gemini.errors import GeminiError

_log = logging.getLogger(__name__)


class SlotAgent:
    """Obeys orders; every method runs on the agent's main thread.

    Args:
        settings: The agent's.
        slot: Machine rank.
        memory: The machine's memory, open.
        pool: Where workers come from.
        port: Keeps a port for the job's process group.
        events: The job's event log, with this slot as its node.
        answer: Writes a key below the agent's lease.
    """

    def __init__(
        self,
        settings: WorkerAgentSettings,
        slot: int,
        memory: MachineAgent,
        pool: WarmPool,
        port: PortReservation,
        *,
        events: EventLog,
        answer: Callable[[str, str], None],
    ) -> None:
        self.slot, self.memory, self.events = slot, memory, events
        self.order: Order | None = None
        self._settings, self._spec, self._keys = settings, settings.spec, JobKeys(settings.job)
        self._pool, self._port, self._answer = pool, port, answer
        self._workers = WorkerGroup(Outcome(slot, 0, settings.incarnation))

    def status(self) -> dict[str, Any]:
        """What there is to say about the slot."""
        order = self.order
        return {
            "generation": 0 if order is None else order.generation,
            "phase": None if order is None else order.phase,
            "workers": self._workers.describe(self._pool.workers()),
        }

    # -- orders ------------------------------------------------------------------------------------------------------

    def obey(self, order: Order) -> bool:
        """Obeys an order that is newer than the last and names this very agent; returns whether it did."""
        if self.order is not None and order.rank <= self.order.rank:
            return False
        me = {member.machine: member.incarnation for member in order.members}.get(self.slot)
        if me != self._settings.incarnation:
            return False  # an order for my predecessor on this slot
        self.order = order
        self.events = replace(self.events, generation=order.generation)
        if order.phase == START:
            self._start_generation(order)
        else:
            self._report(order)
        return True

    def _report(self, order: Order) -> None:
        """Ends the old generation here: no worker, no older replica can change the memory that is reported."""
        exits = self._workers.outcome.exits
        self._workers = WorkerGroup(Outcome(self.slot, order.generation, self._settings.incarnation))
        if not self._pool.kill_workers(self._spec.stop_timeout_s):
            _log.error("workers did not end within %.0f s after SIGKILL", self._spec.stop_timeout_s)
        report = Report(
            machine=self.slot,
            generation=order.generation,
            incarnation=self._settings.incarnation,
            master_port=self._port.renew(),
            memory=self._fence(order),
            exits=exits,
        )
        self._answer(self._keys.report(self.slot), answer_to_json(report))

    def _fence(self, order: Order) -> dict[str, Any]:
        addresses = [(member.host, member.replica_port) for member in order.members]
        try:
            self.memory.set_peers(order.generation, self._spec.nproc_per_node, addresses)
        except GeminiError as error:
            _log.error("this machine's memory does not fit the job: %s", error)
            return {"machine": self.slot, "error": str(error)}
        return self.memory.report()

    def _start_generation(self, order: Order) -> None:
        plan = order.plan
        assert plan is not None
        if plan.id is not None:
            threading.Thread(target=self._retrieve, args=(plan,), name="retrieve", daemon=True).start()
        place = self._place(order)
        tokens = self._workers.expect([place.rank(index) for index in range(self._spec.nproc_per_node)])
        self._pool.launch(
            [
                WorkerCommand(token, self._spec.script, place.environment(index), place.log_path(index))
                for index, token in enumerate(tokens)
            ]
        )

    def _place(self, order: Order) -> WorkerPlace:
        return WorkerPlace(
            job=self._settings.job,
            machine=self.slot,
            nodes=self._spec.nodes,
            nproc_per_node=self._spec.nproc_per_node,
            generation=order.generation,
            max_failures=self._spec.max_failures,
            master_addr=order.members[0].host,
            master_port=order.master_port,
            agent_socket=self._settings.socket_path,
            run_dir=self._settings.run_dir,
            name=self._settings.name,
            domain=self._settings.domain,
            interface=self._settings.interface,
        )

    def _retrieve(self, plan: RecoveryPlan) -> None:
        """Fetches what the workers need, while they start; then, in the background, what full replication lacks."""
        events = self.events
        for name, wanted in (("retrieved", plan.fetches), ("refilled", plan.refills)):
            mine = [fetch for fetch in wanted if fetch.target == self.slot]
            if mine:
                self._fetch(events, name, mine)

    def _fetch(self, events: EventLog, name: str, fetches: Sequence[Fetch]) -> None:
        try:
            received, seconds = self.memory.retrieve(fetches)
        except (GeminiError, OSError, KeyError) as error:
            # The workers see what arrived and plan again from that.
            _log.warning("could not fetch %d shards from peers: %s", len(fetches), error)
            return
        shown = [fetch_to_json(fetch) for fetch in fetches]
        events.append(name, fetches=shown, bytes=received, seconds=seconds)

    # -- workers -----------------------------------------------------------------------------------------------------

    def worker_started(self, token: str, pid: int) -> None:
        """The pool started a worker."""
        pids = self._workers.started(token, pid)
        if pids is not None:
            self.events.append("workers_started", pids=pids)

    def worker_ended(self, leave: WorkerExit) -> None:
        """A worker ended, by itself or by order."""
        self.events.append("worker_exit", **describe_exit(leave, expected=leave.token not in self._workers.ranks))
        if self._workers.ended(leave):
            self._put_outcome()

    def worker_refused(self, rank: int, message: str) -> None:
        """A worker says that it will never train."""
        _log.error("rank %d refuses to train: %s", rank, message)
        self._workers.refused(rank, message)
        self._put_outcome()

    def _put_outcome(self) -> None:
        self._answer(self._keys.outcome(self.slot), answer_to_json(self._workers.outcome))
