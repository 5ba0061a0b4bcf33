"""The state of a training job on one rank: found in a tier, restored into the engine, captured for the next version."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gemini.callbacks.peer_exchange import PeerExchange
from lightning_gemini.callbacks.peer_memory import PeerMemory, RestoredShard
from lightning_gemini.callbacks.persistent_tier import PersistentTier
from lightning_gemini.callbacks.publisher import VersionPublisher
from lightning_gemini.callbacks.ranks import RankGroup, RankIdentity, together
from lightning_gemini.callbacks.traffic import TrafficScheduler
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.controlplane.events import EventLog, append_line
from lightning_gemini.controlplane.refusal import report_refusal
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.core.scheme import Scheme
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.collective_tap import CollectiveTap
from lightning_gemini.dataplane.profiler import Profiler
from lightning_gemini.dataplane.shard import Draft
from lightning_gemini.dataplane.slab import Slab
from lightning_gemini.dataplane.snapshot import Snapshotter
from lightning_gemini.errors import GeminiError
from lightning_gemini.strategies.zero_state import ZeroState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

_FOUND = "gemini_found"
_fits = 0  # Trainer.fit calls of this process: a script may train several models in turn


class JobState:
    """Ties the engine's state to the tiers.

    Args:
        config: The strategy's settings.
        engine: The initialised engine.
        identity: This rank's place.
        root_dir: The Trainer's ``default_root_dir``.

    Raises:
        GeminiError: A setting is impossible, or the agent cannot be used; before training starts.
    """

    def __init__(
        self, config: CheckpointConfig, engine: DeepSpeedEngine, identity: RankIdentity, root_dir: str
    ) -> None:
        global _fits
        self.fit, _fits = _fits, _fits + 1
        self.config, self.identity = config, identity
        self.group = RankGroup()
        self.events = EventLog.from_environment()
        self.memory = PeerMemory(config, identity, self.group)
        self.zero = ZeroState(engine)
        self._planner = shard.Planner()
        self.found: RestoredShard | None = None
        self._declined: VersionId | None = None
        self.persistent = self._open_persistent_tier(root_dir)
        self.finished = False
        self._device = engine.device
        self._publisher: VersionPublisher | None = None
        self._snapshotter: Snapshotter | None = None
        self._profiler: Profiler | None = None
        self._tap: CollectiveTap | None = None
        self.exchange: PeerExchange | None = None

    @property
    def is_restart(self) -> bool:
        """Whether a launcher restarted this run, rather than a person typing its command again."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    # -- restore -----------------------------------------------------------------------------------------------------

    def find(self) -> dict[str, Any] | None:
        """Look in memory, then in the persistent tier. Collective.

        Returns:
            What Lightning restores from; ``None`` to start fresh.

        Raises:
            LayoutMismatchError: The stored state belongs to another model; memory keeps it.
        """
        try:
            self.memory.connect()
            self.found = self.memory.find() or self._find_persistent()
            if self.found is not None:
                stable = self.found.stable
                together(self.group, lambda: self.zero.check(stable))
        except GeminiError as error:
            report_refusal(error)  # here too: Hydra turns exceptions into SystemExit
            raise
        if self.found is not None and self.found.volatile["fit"] != self.fit:
            if self.identity.global_rank == 0:
                log.warning(
                    "memory holds call %d of Trainer.fit, this is call %d: starting this one from its beginning",
                    self.found.volatile["fit"] + 1,
                    self.fit + 1,
                )
            self.found = None
        if self.found is None:
            self.memory.resume_from(None)
            return None
        return self._checkpoint(self.found)

    def is_found(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether it is what :meth:`find` returned, rather than a checkpoint of the user's."""
        return self.found is not None and bool(checkpoint.get(_FOUND))

    def yield_to(self, ckpt_path: Any) -> dict[str, Any] | None:
        """The user gave ``ckpt_path``: it wins, unless a launcher restarted the run that had begun from it.

        Returns:
            What to restore in its place; ``None`` to load it.
        """
        found = self.found
        if found is None:
            return None
        if self.is_restart:
            log.info("carrying on from version %d; ckpt_path=%s was where this run began", found.version, ckpt_path)
            return self._checkpoint(found)
        if self.identity.global_rank == 0:
            log.warning("ckpt_path=%s wins over version %d (%s)", ckpt_path, found.version, found.tier.value)
        self.found, self._declined = None, found.id
        self.memory.resume_from(found.id)  # memory keeps it until a newer version is committed
        return None

    @staticmethod
    def _checkpoint(found: RestoredShard) -> dict[str, Any]:
        return {**found.volatile["lightning"], _FOUND: True}

    def restore(self) -> None:
        """Load the found shard into the engine. Collective."""
        found = self.found
        assert found is not None
        began = time.monotonic()
        self.zero.restore(found.stable, found.volatile)
        self.memory.resume_from(found.id)
        seconds = found.seconds + time.monotonic() - began
        self.events.append("restored", version=found.version, tier=str(found.tier.value), seconds=seconds)
        if self.identity.global_rank == 0:
            log.warning("resumed from version %d (%s) in %.2f s", found.version, found.tier.value, seconds)

    def _open_persistent_tier(self, root_dir: str) -> PersistentTier | None:
        if not self.config.persist_every_s:
            return None
        return PersistentTier(
            self.config, self.identity, self.group, root_dir, probe=not self.is_restart, events=self.events
        )

    def _find_persistent(self) -> RestoredShard | None:
        return self.persistent.find(partitioned=self.zero.partitioned) if self.persistent is not None else None

    # -- publish -----------------------------------------------------------------------------------------------------

    def open(self, lightning_state: dict[str, Any]) -> VersionPublisher:
        """Map the slab and get ready to publish. Collective.

        Raises:
            CapacityError: The machine has not enough memory; before training starts.
        """
        try:
            slab = self.memory.attach(self._expected_bytes(lightning_state))
        except GeminiError as error:
            report_refusal(error)  # here too: Hydra turns exceptions into SystemExit
            raise
        self.slab = slab
        self.traffic = self._schedule_traffic(slab)
        self.exchange = self._exchange_with_peers(slab)
        self._snapshotter = Snapshotter(
            self._notify, self._device, self.traffic.may_copy, self.identity.nproc_per_machine
        )
        self._snapshotter.prepare(slab.buffers)
        self._snapshotter.start()
        self._publisher = VersionPublisher(
            slab,
            self._snapshotter,
            RankGroup(),  # votes are cast on another thread, whatever ranks agree on meanwhile
            self.memory.generation,
            replicated=self.memory.replicas > 1,
            commit_wait_s=self.config.commit_wait_s,
            resumed=self.found.id if self.found else None,
            declined=self._declined,
            record=_cost_log(self.identity.global_rank),
        )
        self._publisher.votes = self.traffic.votes
        if self.persistent is not None:
            self.persistent.begin(self.found)
        self.found = None  # frees the restored tensors
        if self._profiler is not None:
            profiler = self._profiler
            self.zero.base_optimizer.register_step_pre_hook(lambda *_: profiler.step_began())
        self.zero.base_optimizer.register_step_pre_hook(self._publisher.before_step)
        return self._publisher

    def _schedule_traffic(self, slab: Slab) -> TrafficScheduler:
        """Listen to training's collectives where that is of use: where copies go to other machines in idle spans."""
        if self.memory.replicas > 1 and Scheme(self.config.schedule).paced:
            self._profiler = Profiler(slab.pace, self._device)
            self._tap = CollectiveTap(self._profiler)
            self._tap.install()
        traffic = TrafficScheduler(
            self.config,
            slab,
            self.group,
            self._profiler,
            self.memory.measure_link,
            self.memory.replicas,
            self._announce_schedule,
        )
        traffic.start(self.zero.step, self.found.volatile.get("profile") if self.found else None)
        return traffic

    def _exchange_with_peers(self, slab: Slab) -> PeerExchange | None:
        if self.memory.replicas == 1 or self.config.transport != "p2p":
            return None
        exchange = PeerExchange(self.memory, slab, self._device, self.config, self.fit)
        exchange.start()
        return exchange

    def _notify(self) -> None:
        """A version was begun, or completed."""
        self.memory.client.notify()
        if self.exchange is not None:
            self.exchange.notify()

    def _announce_schedule(self, text: str, fields: dict[str, Any]) -> None:
        if self.identity.global_rank == 0:
            log.log(logging.INFO if fields["fits"] else logging.WARNING, "%s", text)
            self.events.append("schedule", **fields)

    def draft(self, lightning_state: dict[str, Any], extra: dict[str, Any]) -> Draft:
        """Take the state as it is now.

        Args:
            lightning_state: Lightning's checkpoint dictionary, without weights and optimizer states.
            extra: What else must travel: random state, the profile of the idle spans.
        """
        read_stable, volatile = self.zero.capture()
        volatile = {**volatile, **extra, "lightning": lightning_state, "fit": self.fit}
        return self._planner.draft(read_stable, volatile)

    def wait_until_read(self) -> None:
        """Until no version in the making looks at the engine's state: DeepSpeed changes it for a moment to read it."""
        if self._publisher is not None:
            self._publisher.wait_until_read()

    def _expected_bytes(self, lightning_state: dict[str, Any]) -> int:
        """The first version may lack the moments that the first step creates: two more copies of the weights."""
        layout = self.draft(lightning_state, {}).finish()
        state = self.zero.base_optimizer.state
        missing = 0 if state else 2 * self.zero.master_bytes
        return layout.total_bytes + missing + (1 << 20)

    def close(self) -> None:
        """Let go of everything; the agent keeps the memory unless the job is finished."""
        if self._tap is not None and self._profiler is not None:
            self._tap.remove()
            self._profiler.close()
        if self._publisher is not None:
            self._publisher.drain()
        if self.exchange is not None:
            self.exchange.close(orderly=self.finished)
        if self._snapshotter is not None:
            self._snapshotter.close()
        if self.persistent is not None:
            self.persistent.close(finished=self.finished)
        self.memory.close(finished=self.finished)


def _cost_log(rank: int) -> Callable[[dict[str, Any]], None]:
    """Writes one line a version to ``<run dir>/stats``, if there is a run directory."""
    run_dir = os.environ.get("LIGHTNING_GEMINI_RUN_DIR")
    if run_dir is None:
        return lambda costs: None
    path = Path(run_dir) / "stats" / f"rank{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    return lambda costs: append_line(path, json.dumps({"time": time.time(), **costs}))
