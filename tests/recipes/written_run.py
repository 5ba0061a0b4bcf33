"""Writes the files of a run whose failures, restores and steps are known exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RANKS = 4
START = 1000.0
STEP_S = 0.5


class WrittenRun:
    """A four-rank run with a clock of its own.

    Args:
        folder: The run directory to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.step, self.generation = folder, START, 0, 1
        for name in ("steps", "stats"):
            (folder / name).mkdir(parents=True)
        self.event("job_started", nodes=RANKS, world_size=RANKS)
        self.event("generation_started")

    def event(self, name: str, **fields: Any) -> None:
        record = {"time": self.now, "node": None, "rank": None, "generation": self.generation, "event": name, **fields}
        _append(self.folder / "events.jsonl", record)

    def train(self, until: int, *, checkpoints: bool = True) -> WrittenRun:
        while self.step < until:
            self.step += 1
            self.now += STEP_S
            for rank in range(RANKS):
                loss = loss_at(self.step, rank)
                record = {"time": self.now, "step": self.step, "loss": loss, "node": rank, "rank": rank, "tokens": 100}
                record["generation"] = self.generation
                _append(self.folder / "steps" / f"rank{rank}.jsonl", record)
                if checkpoints:
                    _append(self.folder / "stats" / f"rank{rank}.jsonl", _version(self.now, self.step, self.generation))
        return self

    def fail(self, kind: str, nodes: list[int], version: int, tiers: dict[int, str]) -> WrittenRun:
        """Noticed after 2 s, workers restore from 1 s later for half a second, one by one."""
        self.now += 0.1
        fields = {"kind": kind, "nodes": nodes, "node": nodes[0], "pids": [100 + n for n in nodes], "signal": "SIGKILL"}
        self.event("fault_injected", at_step=self.step, **fields)
        self.now += 2.0
        self.event("failure_detected", kind=kind, nodes_lost=nodes, detail=f"lost {nodes}")
        self.generation += 1
        self.event("generation_started")
        if kind == "hardware":
            self.event("retrieved", node=nodes[0], seconds=0.25, bytes=1, fetches=[])
        self.now += 1.5
        for rank in range(RANKS):
            tier = tiers.get(rank, "local_memory")
            self.event("restored", rank=rank, version=version, tier=tier, seconds=0.5, time=self.now + rank / 10)
        self.now += 0.3
        self.step = version
        return self


def loss_at(step: int, rank: int) -> float:
    """A float whose decimals do not end soon."""
    return 7.0 / (step + rank / 3)


def _version(now: float, step: int, generation: int) -> dict[str, Any]:
    costs = {"stall_s": step / 1000, "copy_s": 0.01, "replica_complete_s": 0.02, "bytes": 4096, "skipped": 0}
    return {"time": now, "version": step, "generation": generation, **costs}


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
