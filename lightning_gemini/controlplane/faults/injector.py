"""Does one fault to a running job, and writes down what was done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog
from lightning_gemini.controlplane.faults import veth
from lightning_gemini.controlplane.faults.corruption import flip_byte
from lightning_gemini.controlplane.faults.killing import etcd_members, kill_processes
from lightning_gemini.controlplane.faults.lasting import CutConnections, LastingFault, LinkDown, Pause
from lightning_gemini.controlplane.faults.observer import Sighting
from lightning_gemini.controlplane.processes import children_of
from lightning_gemini.core.failure_model import Draws
from lightning_gemini.core.fault import CORRUPT, ETCD, LINK, PAUSE, ROOT, SOFTWARE, PlannedFault

_DEFAULT_LASTS_S = 3.0


class NoVictimError(Exception):
    """There is nothing to hit right now; says why."""


class FaultInjector:
    """Carries faults out; a context manager, which takes back everything that lasts.

    Args:
        job: What `find_job` returned.
        draws: For what a plan leaves open: victims, bytes.
    """

    def __init__(self, job: dict[str, Any], draws: Draws) -> None:
        self._job, self._draws = job, draws
        self._events = EventLog(Path(job["run_dir"]) / EVENTS_FILE)
        self._lasting: list[LastingFault] = []

    def __enter__(self) -> FaultInjector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lasting(self) -> bool:
        """Whether something is still stopped or cut."""
        return bool(self._lasting)

    @property
    def stopped_nodes(self) -> set[int]:
        """Machines whose agents are stopped and cannot answer."""
        return {fault.node for fault in self._lasting if isinstance(fault, Pause)}

    def poll(self) -> None:
        """Goes on with what lasts; to be called several times a second."""
        self._lasting = [fault for fault in self._lasting if fault.poll()]

    def close(self) -> None:
        """Continues what is stopped, restores what is cut; idempotent."""
        for fault in self._lasting:
            fault.close()
        self._lasting.clear()

    def inject(self, fault: PlannedFault, seen: Sighting, *, ready: bool = True) -> dict[str, Any]:
        """Does it now.

        Args:
            fault: What to do; its moment has come.
            seen: The job a moment ago.
            ready: Hit only machines that have workers; else any whose agent answers.

        Returns:
            The ``fault_injected`` event: ``kind``, ``nodes``, ``pids``, ``signal``, ``at_step`` and what is particular.

        Raises:
            NoVictimError: Nothing was done.
        """
        now = time.time()
        if fault.kind == ETCD:
            done = self._kill_etcd(fault)
        elif fault.kind == ROOT and seen.root is None:
            done = self._kill_standby(seen.root_standby)
        else:
            nodes = list(fault.victims) or self._any_nodes(fault, seen)
            if not seen.has(nodes, fault.rank) if ready else not all(seen.status(node) for node in nodes):
                raise NoVictimError(f"not every node of {nodes} has an agent and workers that could be hit")
            done = self._method(fault.kind)(fault, nodes, seen)
        about = {"time": now, "generation": seen.generation, "kind": fault.kind, "at_step": seen.step}
        return self._events.append("fault_injected", **{**about, **done})

    def miss(self, fault: PlannedFault, reason: str) -> dict[str, Any]:
        """Writes down that a planned fault could not be done."""
        return self._events.append("fault_missed", kind=fault.kind, nodes=list(fault.victims), reason=reason)

    def _any_nodes(self, fault: PlannedFault, seen: Sighting) -> list[int]:
        if fault.kind == ROOT and seen.root is not None:
            return [seen.root]
        able = [node for node in range(len(seen.statuses)) if seen.has([node], fault.rank)]
        if not able:
            raise NoVictimError("no machine has workers")
        return [self._draws.choice(able)]

    def _method(self, kind: str) -> Callable[[PlannedFault, Sequence[int], Sighting], dict[str, Any]]:
        one_each = {SOFTWARE: self._kill_worker, PAUSE: self._pause, LINK: self._cut, CORRUPT: self._corrupt}
        return one_each.get(kind, self._kill_machines)

    def _kill_worker(self, fault: PlannedFault, nodes: Sequence[int], seen: Sighting) -> dict[str, Any]:
        for node in nodes:
            if not seen.has([node], fault.rank):
                raise NoVictimError(f"node {node} has no worker to kill")
        rank = fault.rank
        if rank is None:
            status = seen.status(nodes[0])
            assert status is not None
            rank = int(status["workers"][0]["rank"])
        pids = kill_processes([seen.worker(node, fault.rank) for node in nodes], whole_groups=False)
        return self._killed(nodes, pids, rank)

    def _kill_machines(self, fault: PlannedFault, nodes: Sequence[int], seen: Sighting) -> dict[str, Any]:
        return self._killed(
            nodes, kill_processes([pid for node in nodes for pid in seen.processes(node)], whole_groups=True)
        )

    def _kill_standby(self, standby: dict[str, Any] | None) -> dict[str, Any]:
        """A machine without a slot: its agent, and what that started."""
        if standby is None:
            raise NoVictimError("no agent knows of a root")
        agent = int(standby["pid"])
        pids = kill_processes([agent, *children_of(agent)], whole_groups=True)
        return {**self._killed([], pids), "standby": standby["name"]}

    def _kill_etcd(self, fault: PlannedFault) -> dict[str, Any]:
        members = etcd_members(self._job)
        if not members:
            raise NoVictimError("no member of an etcd that this job started runs now")
        number = fault.victims[0] if fault.victims else self._draws.randrange(len(members))
        pids = kill_processes([members[number % len(members)]], whole_groups=True)
        return {**self._killed([], pids), "member": number % len(members), "members": len(members)}

    @staticmethod
    def _killed(nodes: Sequence[int], pids: list[int], rank: int | None = None) -> dict[str, Any]:
        if not pids:
            raise NoVictimError("the processes had ended already")
        return {
            "node": nodes[0] if nodes else None,
            "rank": rank,
            "nodes": list(nodes),
            "pids": pids,
            "signal": "SIGKILL",
        }

    def _pause(self, fault: PlannedFault, nodes: Sequence[int], seen: Sighting) -> dict[str, Any]:
        lasts_s = _DEFAULT_LASTS_S if fault.lasts_s is None else fault.lasts_s
        agents = [seen.processes(node)[0] for node in nodes]
        for node, agent in zip(nodes, agents, strict=True):
            with self._or_no_victim():
                self._lasting.append(Pause(node, agent, lasts_s))
        return {"node": nodes[0], "nodes": list(nodes), "pids": agents, "signal": "SIGSTOP", "seconds": lasts_s}

    def _cut(self, fault: PlannedFault, nodes: Sequence[int], seen: Sighting) -> dict[str, Any]:
        lasts_s = _DEFAULT_LASTS_S if fault.lasts_s is None else fault.lasts_s
        done: dict[str, Any] = {"interfaces": [], "connections": 0}
        agents = [seen.processes(node)[0] for node in nodes]
        for node, agent in zip(nodes, agents, strict=True):
            with self._or_no_victim():
                if veth.in_other_namespace(agent):
                    interface = veth.outer_end(agent)
                    self._lasting.append(LinkDown(node, interface, lasts_s))
                    done["interfaces"].append(interface)
                else:
                    cut = CutConnections(node, agent, str(self._job["etcd"]).split(","), lasts_s)
                    self._lasting.append(cut)
                    done["connections"] += cut.cut
        if not done["interfaces"] and not done["connections"]:
            raise NoVictimError(f"node {nodes[0]} has no connection to a peer")
        return {"node": nodes[0], "nodes": list(nodes), "pids": agents, "signal": None, "seconds": lasts_s, **done}

    def _corrupt(self, fault: PlannedFault, nodes: Sequence[int], seen: Sighting) -> dict[str, Any]:
        node = nodes[0]
        agent, *others = seen.processes(node)
        if node in self.stopped_nodes:
            raise NoVictimError(f"the agent of node {node} is stopped")
        workers = [pid for pid in others if pid in seen.workers.values()]
        flip = flip_byte(agent, workers, self._draws)
        if flip is None:
            raise NoVictimError(f"node {node} holds no complete version")
        return {"node": node, "nodes": [node], "pids": [agent], "signal": None, **asdict(flip)}

    @contextlib.contextmanager
    def _or_no_victim(self) -> Any:
        try:
            yield
        except OSError as error:
            raise NoVictimError(str(error)) from error
