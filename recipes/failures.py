"""Failures at steps drawn from a seed, and how they are injected into a running job."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from progress import Progress, Screen

from lightning_gemini.cli.inject import inject_nodes
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.core.placement import plan_placement


class FailureNotInjectedError(Exception):
    """A run ended before all its failures had happened."""


@dataclass(frozen=True, slots=True)
class PlannedFailure:
    """A failure to inject as soon as all ranks have completed ``at_step``; ``kind``: software, hardware or group."""

    kind: str
    nodes: tuple[int, ...]
    at_step: int


def plan_failures(cfg: DictConfig, seed: int) -> list[PlannedFailure]:
    """Draws step and victims of each failure that ``cfg.gemini.failure`` names, spread over the run."""
    rng = random.Random(seed)
    nodes, kinds = int(cfg.gemini.operator.nodes), list(cfg.gemini.failure.kinds)
    groups = plan_placement(nodes, replicas(cfg), cfg.gemini.placement).groups
    length = int(cfg.trainer.max_steps) // max(len(kinds), 1)
    planned = []
    for index, kind in enumerate(kinds):
        victims = rng.choice(groups) if kind == "group" else (rng.randrange(nodes),)
        step = index * length + rng.randint(max(1, length // 4), max(1, length * 3 // 4))
        planned.append(PlannedFailure(kind, tuple(victims), step))
    return planned


class Injector:
    """Injects the planned failures, one after the other, into a running job.

    Args:
        run_dir: The job's.
        planned: In the order of their steps.
        screen: Says what was killed.
    """

    def __init__(self, run_dir: Path, planned: Sequence[PlannedFailure], screen: Screen) -> None:
        self._run_dir, self._waiting, self._screen = run_dir, list(planned), screen

    def poll(self, progress: Progress) -> None:
        """Injects the next failure if its step is complete; a group's loss waits for a persistent version."""
        if not self._waiting or progress.step < self._waiting[0].at_step:
            return
        if self._waiting[0].kind == "group" and not (self._run_dir / "persistent" / "latest").exists():
            return
        failure = self._waiting.pop(0)
        kind = "software" if failure.kind == "software" else "hardware"
        event = inject_nodes(self._run_dir, kind, failure.nodes, timeout_s=60.0)
        victim = {"software": "worker of node", "hardware": "node"}.get(failure.kind, "placement group, nodes")
        names = ", ".join(map(str, failure.nodes))
        self._screen.say(f"SIGKILL to {victim} {names} at step {event['at_step']} (pids {event['pids']})")

    def check_done(self) -> None:
        """Raises FailureNotInjectedError if the run ended before all failures happened."""
        if self._waiting:
            left = ", ".join(f"{failure.kind} at step {failure.at_step}" for failure in self._waiting)
            raise FailureNotInjectedError(f"the run ended before these failures could be injected: {left}")


def replicas(cfg: DictConfig) -> int:
    """Copies of every shard, chosen by the number of nodes where the configuration does not say."""
    return CheckpointConfig(replicas=cfg.gemini.replicas).replicas_for(int(cfg.gemini.operator.nodes))
