"""The job as its agents see it, from outside."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.errors import AgentError


@dataclass(frozen=True, slots=True)
class Sighting:
    """The job as its agents saw it a moment ago: one status for each node, None where none answered."""

    statuses: tuple[dict[str, Any] | None, ...]
    world_size: int

    @property
    def generation(self) -> int:
        """Newest generation."""
        return max((status["generation"] for status in self.statuses if status), default=0)

    @property
    def progress(self) -> dict[int, int]:
        """Global rank → optimizer steps that it completed, as far as agents answered."""
        return {int(rank): int(step) for status in self.statuses if status for rank, step in status["progress"].items()}

    @property
    def step(self) -> int:
        """Lowest optimizer step completed by all ranks; 0 while a rank has none."""
        steps = self.progress.values()
        return min(steps) if len(steps) == self.world_size else 0

    @property
    def workers(self) -> dict[int, int]:
        """Global rank → process id of its worker, for all workers that run."""
        return {worker["rank"]: worker["pid"] for status in self.statuses if status for worker in status["workers"]}

    @property
    def in_order(self) -> bool:
        """Every agent answers, all are in the same generation, and every rank has a worker."""
        generations = {status["generation"] if status else -1 for status in self.statuses}
        return len(generations) == 1 and -1 not in generations and len(self.workers) == self.world_size

    @property
    def root(self) -> int | None:
        """Machine rank of the root, as most agents know it."""
        known = [status["root"] for status in self.statuses if status and status.get("root") is not None]
        return max(known, key=known.count) if known else None

    @property
    def root_standby(self) -> dict[str, Any] | None:
        """Name and agent's pid of the root, where that is a machine standing by."""
        for status in self.statuses:
            if status is not None and status.get("root") is None:
                for standby in status.get("standbys", ()):
                    if standby["name"] == status["root_name"]:
                        return dict(standby)
        return None

    def status(self, node: int) -> dict[str, Any] | None:
        """Returns a node's status."""
        return self.statuses[node] if 0 <= node < len(self.statuses) else None

    def has(self, nodes: Sequence[int], rank: int | None) -> bool:
        """Says whether the nodes have workers to kill, the wanted rank among them."""
        for node in nodes:
            status = self.status(node)
            ranks = [worker["rank"] for worker in status["workers"]] if status else []
            if not ranks or (rank is not None and rank not in ranks):
                return False
        return True

    def worker(self, node: int, rank: int | None) -> int:
        """Returns the process id of a worker of a node that `has` it, by default its first."""
        status = self.status(node)
        assert status is not None
        return next(int(worker["pid"]) for worker in status["workers"] if rank is None or worker["rank"] == rank)

    def processes(self, node: int) -> list[int]:
        """Returns all processes of a node, the agent first, so that nothing can react to the death of another."""
        status = self.status(node)
        if status is None:
            return []
        pids = [status["pid"], status["pool_pid"], *(worker["pid"] for worker in status["workers"])]
        return [pid for pid in pids if pid is not None]


class Observer:
    """Asks all agents of a job for their status, over connections that it keeps; a context manager.

    Args:
        job: What `find_job` returned.
        timeout_s: The longest wait for an agent's answer.
    """

    def __init__(self, job: dict[str, Any], timeout_s: float = 5.0) -> None:
        self.job, self._timeout_s = job, timeout_s
        self._clients: dict[int, AgentClient] = {}

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up everywhere."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def look(self, without: Collection[int] = ()) -> Sighting:
        """Asks everyone once; an agent that does not answer has no status.

        Args:
            without: Nodes that are not asked: their agents are known to be stopped.
        """
        machines = sorted(self.job["machines"], key=lambda machine: int(machine["node"]))
        statuses = tuple(
            None if int(machine["node"]) in without else self._ask(int(machine["node"]), Path(machine["socket"]))
            for machine in machines
        )
        return Sighting(statuses, self.job["nodes"] * self.job["nproc_per_node"])

    def report(self, node: int) -> dict[str, Any] | None:
        """Asks one agent for its report: replicas, placement and what it holds; None if it does not answer."""
        sockets = {int(machine["node"]): Path(machine["socket"]) for machine in self.job["machines"]}
        return self._ask(node, sockets[node], AgentClient.report)

    def _ask(
        self, node: int, socket: Path, question: Callable[[AgentClient], dict[str, Any]] = AgentClient.status
    ) -> dict[str, Any] | None:
        try:
            if node not in self._clients:
                self._clients[node] = AgentClient(socket, self.job["job"], timeout_s=self._timeout_s)
            return question(self._clients[node])
        except AgentError:
            dead = self._clients.pop(node, None)
            if dead is not None:
                dead.close()
            return None
