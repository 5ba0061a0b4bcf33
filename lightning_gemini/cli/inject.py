"""``lightning-gemini inject``: kill a worker, or a whole node with its memory, for real."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gemini.errors import AgentError, ConfigurationError

if TYPE_CHECKING:
    from lightning_gemini.controlplane.agent_client import AgentClient

KINDS = ("software", "hardware")
_POLL_S = 0.02


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("inject", help="kill a worker (software) or a node (hardware) with SIGKILL")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--node", type=int, required=True, action="append", metavar="I", help="repeat for several")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="global rank to kill (software; default: the node's first)"
    )
    parser.add_argument("--at-step", type=int, metavar="S", help="wait until every rank has completed step S")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run (default: the newest)")
    parser.set_defaults(command=_command)


def inject(
    run_dir: Path | None,
    kind: str,
    node: int,
    rank: int | None = None,
    at_step: int | None = None,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Kills one worker, or one node: agent, warm pool, workers and with them the node's memory.

    Args:
        run_dir: The run; the newest by default.
        kind: ``software`` or ``hardware``.
        node: Machine rank.
        rank: Global rank to kill (software); the node's first by default.
        at_step: Kill as soon as every rank has completed this optimizer step; now by default.
        timeout_s: The longest wait for that step, and for workers to be there.

    Returns:
        The ``fault_injected`` event: ``pids``, ``signal``, ``at_step`` (the lowest step completed by all ranks).

    Raises:
        ConfigurationError: If there is no such job, node or rank.
        AgentError: If the step is not reached in time, or the job ended.
    """
    return inject_nodes(run_dir, kind, [node], rank, at_step, timeout_s)


def inject_nodes(
    run_dir: Path | None,
    kind: str,
    nodes: Sequence[int],
    rank: int | None = None,
    at_step: int | None = None,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Kills several nodes (or the first worker of each) at the same moment; see `inject`."""
    from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog
    from lightning_gemini.controlplane.run_directory import find_job

    job = find_job(run_dir)
    _check(job, kind, nodes, rank)
    seen = _wait_for(job, nodes, rank, at_step, timeout_s)
    pids = [pid for node in nodes for pid in seen.victims(kind, node, rank)]
    now = time.time()
    for pid in pids:
        _kill(pid, whole_group=kind == "hardware")
    fields = {"kind": kind, "nodes": list(nodes), "pids": pids, "signal": "SIGKILL", "at_step": seen.step}
    target = seen.status(nodes[0])["workers"][0]["rank"] if kind == "software" and rank is None else rank
    about = {"time": now, "node": nodes[0], "rank": target, "generation": seen.generation}
    return EventLog(Path(job["run_dir"]) / EVENTS_FILE).append("fault_injected", **about, **fields)


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
    def step(self) -> int:
        """Lowest optimizer step completed by all ranks; 0 while a rank has none."""
        steps = [int(step) for status in self.statuses if status for step in status["progress"].values()]
        return min(steps) if len(steps) == self.world_size else 0

    def status(self, node: int) -> dict[str, Any]:
        """Returns a node's status."""
        status = self.statuses[node]
        assert status is not None
        return status

    def has(self, nodes: Sequence[int], rank: int | None) -> bool:
        """Says whether the nodes have workers to kill, the wanted rank among them."""
        for node in nodes:
            status = self.statuses[node]
            ranks = [worker["rank"] for worker in status["workers"]] if status else []
            if not ranks or (rank is not None and rank not in ranks):
                return False
        return True

    def victims(self, kind: str, node: int, rank: int | None) -> list[int]:
        """Returns the pids to kill, in order: first the agent, so that nothing can react."""
        status = self.status(node)
        workers = status["workers"]
        if kind == "software":
            return [next(worker["pid"] for worker in workers if rank is None or worker["rank"] == rank)]
        pids = [status["pid"], status["pool_pid"], *(worker["pid"] for worker in workers)]
        return [pid for pid in pids if pid is not None]


class Observer:
    """Asks all agents of a job for their status, over connections that it keeps; a context manager.

    Args:
        job: What `find_job` returned.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self._clients: dict[int, AgentClient] = {}

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            client.close()

    def look(self) -> Sighting:
        """Asks everyone once; an agent that does not answer has no status."""
        machines = sorted(self.job["machines"], key=lambda machine: int(machine["node"]))
        statuses = tuple(self._ask(int(machine["node"]), Path(machine["socket"])) for machine in machines)
        return Sighting(statuses, self.job["nodes"] * self.job["nproc_per_node"])

    def _ask(self, node: int, socket: Path) -> dict[str, Any] | None:
        from lightning_gemini.controlplane.agent_client import AgentClient

        try:
            if node not in self._clients:
                self._clients[node] = AgentClient(socket, self.job["job"], timeout_s=5.0)
            return self._clients[node].status()
        except AgentError:
            dead = self._clients.pop(node, None)
            if dead is not None:
                dead.close()
            return None


def _check(job: dict[str, Any], kind: str, nodes: Sequence[int], rank: int | None) -> None:
    if kind not in KINDS:
        raise ConfigurationError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not job["alive"]:
        raise ConfigurationError(f"job {job['job']} in {job['run_dir']} is not running")
    if not nodes or not all(0 <= node < job["nodes"] for node in nodes):
        raise ConfigurationError(f"the job has nodes 0 to {job['nodes'] - 1}, got {list(nodes)}")
    if rank is not None and (kind == "hardware" or rank // job["nproc_per_node"] not in nodes):
        raise ConfigurationError(f"--rank is for software failures, and rank {rank} must be on that node")


def _wait_for(
    job: dict[str, Any], nodes: Sequence[int], rank: int | None, at_step: int | None, timeout_s: float
) -> Sighting:
    deadline = time.monotonic() + timeout_s
    with Observer(job) as observer:
        return _watch(observer, nodes, rank, at_step, deadline)


def _watch(
    observer: Observer, nodes: Sequence[int], rank: int | None, at_step: int | None, deadline: float
) -> Sighting:
    from lightning_gemini.controlplane.processes import start_time

    while True:
        seen = observer.look()
        if seen.has(nodes, rank) and (at_step is None or seen.step >= at_step):
            return seen
        if start_time(observer.job["launcher_pid"]) is None:
            raise AgentError(f"the job ended at step {seen.step}, before the failure could be injected")
        if time.monotonic() > deadline:
            raise AgentError(f"step {at_step} not reached in time; the job is at step {seen.step}")
        time.sleep(_POLL_S)


def _kill(pid: int, whole_group: bool) -> None:
    """With the node its workers' own children die too; they are in the workers' process groups."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if whole_group:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _command(chosen: argparse.Namespace) -> int:
    print(json.dumps(inject_nodes(chosen.run_dir, chosen.kind, chosen.node, chosen.rank, chosen.at_step)))
    return 0
