"""What a worker process runs: a miniature training loop around the package's own memory and commit protocol.

The order of calls is that of `GeminiCheckpoint` and `JobState`; Lightning and the engine are what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_gemini.callbacks.peer_memory import PeerMemory
from lightning_gemini.callbacks.publisher import VersionPublisher
from lightning_gemini.callbacks.ranks import RankIdentity
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.controlplane.refusal import report_refusal
from lightning_gemini.core.recovery import Tier, VersionId
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.pace_page import Pace
from lightning_gemini.dataplane.snapshot import Snapshotter
from lightning_gemini.errors import GeminiError
from tests.simulation import truth
from tests.simulation.checks import Checks
from tests.simulation.collectives import Rendezvous, SimulatedRankGroup
from tests.simulation.disk import Disk, SimulatedPersister
from tests.simulation.scheduler import Active

_WORDS = 96
_INDICES = torch.arange(1, _WORDS + 1, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Program:
    """The user's script.

    Attributes:
        config: The strategy's settings.
        steps: Optimizer steps of the whole training.
        step_s: How long one takes.
        persist_every_s: Seconds between two persistent checkpoints.
    """

    config: CheckpointConfig
    steps: int
    step_s: float
    persist_every_s: float


class Trainer:
    """One worker process's run of the script."""

    def __init__(self, program: Program, rendezvous: Rendezvous, disk: Disk, checks: Checks) -> None:
        scheduler = Active.scheduler
        assert scheduler.current is not None
        environ = scheduler.current.process.environ
        self._program, self._checks = program, checks
        self._rank, self._world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        self._identity = RankIdentity(
            self._rank,
            int(environ["LOCAL_RANK"]),
            int(environ["GROUP_RANK"]),
            int(environ["LOCAL_WORLD_SIZE"]),
            int(environ["GROUP_WORLD_SIZE"]),
        )
        ranks = rendezvous.join(environ)
        self._group = SimulatedRankGroup(ranks, self._rank)
        self._votes = SimulatedRankGroup(ranks, self._rank, "votes")
        self._training = SimulatedRankGroup(ranks, self._rank, "training")
        self._memory = PeerMemory(program.config, self._identity, self._group)  # type: ignore[arg-type]
        self._persister = SimulatedPersister(disk, self._rank, self._world_size)
        self._disk = disk
        self._weight, self._step = truth.mix(self._rank), 0
        self._tensor = _INDICES * self._weight
        self._planner = shard.Planner()
        self._persisted_at = scheduler.now

    def run(self) -> None:
        """Restores, trains to the end, and leaves."""
        try:
            found = self._restore()
            publisher = self._open(found)
        except GeminiError as error:
            report_refusal(error)
            raise
        self._train(publisher)
        publisher.drain()
        self._snapshotter.close()
        self._memory.close(finished=True)

    # -- restore -------------------------------------------------------------------------------------------------------

    def _restore(self) -> VersionId | None:
        self._memory.connect()
        found = self._memory.find()
        if found is not None:
            self._checks.restored(self._identity, self._memory.generation, found.tier, found.id)
            self._load(found.version, found.stable, found.volatile)
            self._memory.resume_from(found.id)
            return found.id
        step = self._find_persistent()
        tier = Tier.NONE if step is None else Tier.PERSISTENT
        self._checks.restored(self._identity, self._memory.generation, tier, None, step)
        self._memory.resume_from(None)
        return None

    def _load(self, version: int, stable: dict[str, Any], volatile: dict[str, Any]) -> None:
        weight, step = int(volatile["weight"]), int(volatile["step"])
        self._persisted_at = float(volatile["persisted_at"])
        if not torch.equal(stable["tensor"], _INDICES * weight):
            self._checks.violated(2, f"rank {self._rank} restored a torn tensor of version {version}")
        self._begin_at(step, weight)
        if step != version:
            self._checks.violated(2, f"rank {self._rank} restored step {step} as version {version}")

    def _begin_at(self, step: int, weight: int) -> None:
        self._step, self._weight = step, weight
        self._tensor = _INDICES * weight
        if weight != truth.expected(self._world_size, self._rank, step):
            self._checks.violated(2, f"rank {self._rank} restored wrong bytes for step {step}")

    def _find_persistent(self) -> int | None:
        for step in self._group.from_first(self._disk.resumable()):
            try:
                weight = self._persister.load(step)
            except OSError:
                weight = None
            if all(self._group.gather(weight is not None)):
                assert weight is not None
                self._begin_at(step, weight)
                return int(step)
        return None

    # -- train ---------------------------------------------------------------------------------------------------------

    def _open(self, found: VersionId | None) -> VersionPublisher:
        self._slab = self._memory.attach(self._draft().finish().total_bytes)
        self._pace()
        self._snapshotter = Snapshotter(self._memory.client.notify, torch.device("cpu"))
        self._snapshotter.start()
        return VersionPublisher(
            self._slab,
            self._snapshotter,
            self._votes,  # type: ignore[arg-type]
            self._memory.generation,
            replicated=self._memory.replicas > 1,
            commit_wait_s=self._program.config.commit_wait_s,
            resumed=found,
            declined=None,
            record=lambda costs: None,
        )

    def _pace(self) -> None:
        """Every other rank's versions travel in pieces while it computes; in the workers' next run the others'."""
        if (self._rank + self._memory.generation) % 2:
            step_s = self._program.step_s
            self._slab.pace.set_plan(
                [step_s / 2, 0.0],
                bandwidth_bytes_per_s=1e6,
                startup_s=0.0,
                chunk_bytes=200,
                window_bytes=800,
                periods_s=[step_s, 0.0],
            )
            self._slab.pace.set_pace(Pace.PACED)

    def _draft(self) -> shard.Draft:
        volatile = {"step": self._step, "weight": self._weight, "persisted_at": self._persisted_at}
        return self._planner.draft(lambda: {"tensor": self._tensor}, volatile)

    def _train(self, publisher: VersionPublisher) -> None:
        settled = self._step
        while self._step < self._program.steps:
            newest = publisher.newest
            if self._step != settled or newest is None:
                settled = self._step
                self._checkpoint(publisher, newest)
            self._take_step(publisher)
            self._slab.buffers[0].report_progress(self._step)
            self._checks.stepped(self._rank, self._step)

    def _checkpoint(self, publisher: VersionPublisher, newest: VersionId | None) -> None:
        publisher.settle()
        self._checks.committed(publisher.committed)
        self._persist_if_due(publisher)
        if (newest is None or self._step != newest.version) and publisher.ready(self._step):
            publisher.publish(self._step, self._draft(), Active.scheduler.now)
            self._checks.published(self._rank)

    def _take_step(self, publisher: VersionPublisher) -> None:
        scheduler, step, pace = Active.scheduler, self._step + 1, self._slab.pace
        pace.open_span(0)
        scheduler.sleep(self._program.step_s * (0.8 + 0.4 * scheduler.random.random()))
        pace.close_span()
        total = self._training.total(truth.gradient(self._rank, step, self._weight))
        pace.open_span(1)
        publisher.before_step()
        self._weight = truth.updated(self._rank, step, self._weight, total)
        self._tensor.copy_(_INDICES * self._weight)  # in place, as optimizers do
        self._step = step
        if self._weight != truth.expected(self._world_size, self._rank, step):
            self._checks.violated(4, f"rank {self._rank} has another loss at step {step} than an undisturbed run")

    def _persist_if_due(self, publisher: VersionPublisher) -> None:
        now = Active.scheduler.now
        if publisher.agreed.persist:
            self._persisted_at = now
            buffer, version = publisher.committed_buffer(), publisher.committed
            if buffer is not None and version is not None:
                self._persister.start(buffer, version)
        due = now - self._persisted_at >= self._program.persist_every_s
        if due and self._rank == 0 and not self._persister.busy:
            publisher.votes.persist = True
