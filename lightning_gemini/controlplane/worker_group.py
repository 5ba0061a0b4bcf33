"""The workers of one machine and generation: who they are, who runs, and how they ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_gemini.controlplane.orders import Outcome, RankExit
from lightning_gemini.controlplane.warm_pool import WorkerExit


@dataclass(slots=True)
class WorkerGroup:
    """Bookkeeping of one generation's workers; a new generation gets a new group.

    Attributes:
        outcome: How they ended so far.
        ranks: Token → global rank; empty until they are ordered to start, and again once their end is ordered.
        pids: Global rank → process id of those that have started.
    """

    outcome: Outcome
    ranks: dict[str, int] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)
    _good: set[int] = field(default_factory=set)

    def expect(self, ranks: list[int]) -> list[str]:
        """Names the workers that are about to start; returns their tokens."""
        self.ranks = {f"{self.outcome.generation}:{rank}": rank for rank in ranks}
        return list(self.ranks)

    def started(self, token: str, pid: int) -> list[int] | None:
        """Notes a start; returns the pids in rank order when it was the last one."""
        if token not in self.ranks:
            return None  # of a generation that is over
        self.pids[self.ranks[token]] = pid
        return [self.pids[rank] for rank in sorted(self.pids)] if len(self.pids) == len(self.ranks) else None

    def ended(self, leave: WorkerExit) -> bool:
        """Notes an end; returns whether the root must hear of it."""
        if leave.token not in self.ranks:
            return False
        rank = self.ranks[leave.token]
        if leave.code == 0:
            self._good.add(rank)
        else:
            exits = (*self.outcome.exits, RankExit(rank, leave.pid, leave.code, leave.signal, time.time()))
            self.outcome = replace(self.outcome, exits=exits)
        self.outcome = replace(self.outcome, finished=len(self._good) == len(self.ranks))
        return bool(self.outcome.exits) or self.outcome.finished

    def refused(self, rank: int, message: str) -> None:
        """Notes that a worker will not train, and that starting again cannot help."""
        self.outcome = replace(self.outcome, fatal=f"rank {rank} refuses to train: {message}")

    def describe(self, running: Mapping[int, str]) -> list[dict[str, Any]]:
        """Returns rank and pid of the live workers, given pid → token."""
        known = [{"rank": self.ranks[token], "pid": pid} for pid, token in running.items() if token in self.ranks]
        return sorted(known, key=lambda worker: worker["rank"])


def describe_exit(leave: WorkerExit, expected: bool) -> dict[str, Any]:
    """Returns the fields of a ``worker_exit`` event; ``expected`` says that its agent ended it."""
    generation, rank = leave.token.split(":")
    fields = {"pid": leave.pid, "code": leave.code, "signal": leave.signal, "expected": expected}
    return {"rank": int(rank), "generation": int(generation), **fields}
