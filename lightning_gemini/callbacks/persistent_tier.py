"""The persistent tier as ranks use it together: where it is, what can be resumed from it, and when it is written."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning_gemini.callbacks.data_position import set_aside_positions
from lightning_gemini.callbacks.peer_memory import RestoredShard
from lightning_gemini.callbacks.ranks import RankGroup, RankIdentity, together
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.controlplane import standalone
from lightning_gemini.controlplane.events import EventLog
from lightning_gemini.core.recovery import Tier, VersionId
from lightning_gemini.dataplane import persistent_directory
from lightning_gemini.dataplane.persister import Persister
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.errors import LayoutMismatchError, PersistError
from lightning_gemini.strategies.zero_state import ZeroState

log = logging.getLogger(__name__)


class PersistentTier:
    """Checkpoint directories that all ranks read and write together.

    Args:
        config: The strategy's settings; ``persist_every_s`` is not 0.
        identity: This rank's place.
        group: All ranks.
        root_dir: The Trainer's ``default_root_dir``.
        probe: Whether a directory that the user named is refused if it cannot be written. A run that goes on after a
            failure is not refused for its disk's sake: the persister says what is wrong.
        events: Takes ``persisted``.

    Attributes:
        directory: The DeepSpeed ``save_dir``.

    Raises:
        PersistError: The directory that the user named cannot be written; on every rank.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        identity: RankIdentity,
        group: RankGroup,
        root_dir: str,
        *,
        probe: bool,
        events: EventLog,
    ) -> None:
        self._config, self._identity, self._group = config, identity, group
        explicit = config.persist_dir
        if explicit is not None:
            probes = probe and identity.local_rank == 0
            together(group, lambda: persistent_directory.probe(explicit) if probes else None)
        self.directory = Path(explicit or group.from_first(_default_directory(root_dir)))
        self._begun_at = self._written_at = time.time()
        self._persister = Persister(
            self.directory,
            identity.global_rank,
            self._world_size,
            _deepspeed_files,
            _recovery_scripts(),
            events.append,
        )
        self._persister.discard_abandoned()

    @property
    def _world_size(self) -> int:
        return self._identity.machines * self._identity.nproc_per_machine

    # -- read ----------------------------------------------------------------------------------------------------------

    def find(self, *, partitioned: bool) -> RestoredShard | None:
        """This rank's part of the newest checkpoint that every rank can read. Collective.

        Args:
            partitioned: Whether parameters are partitioned (ZeRO-3).

        Raises:
            LayoutMismatchError: Another number of ranks wrote it.
        """
        began = time.monotonic()
        for name in self._group.from_first(persistent_directory.resumable(self.directory)):
            found = self._read(self.directory / name, partitioned, began)
            if all(self._group.gather(found is not None)):
                return found
        return None

    def _read(self, path: Path, partitioned: bool, began: float) -> RestoredShard | None:
        rank = self._identity.global_rank
        try:
            stable, volatile, world_size = persistent_directory.load(path, rank, partitioned=partitioned)
        except PersistError as error:
            log.warning("%s; trying an older one", error)
            return None
        if world_size != self._world_size:
            raise LayoutMismatchError(
                f"the persistent checkpoint {path} was written by {world_size} ranks, this run has {self._world_size}: "
                "use as many, convert it (DeepSpeed Universal Checkpointing), or choose another persist_dir"
            )
        version = int(volatile["counters"]["global_steps"])
        return RestoredShard(version, None, Tier.PERSISTENT, stable, volatile, time.monotonic() - began)

    # -- write ---------------------------------------------------------------------------------------------------------

    def begin(self, found: RestoredShard | None) -> None:
        """Training begins, from what was found."""
        carried_on = found is not None and found.tier is not Tier.PERSISTENT
        mark = found.volatile.get("persisted") if found is not None and carried_on else None
        now = time.time()
        if mark is not None and mark["directory"] == str(self.directory):
            now = min(now, mark["at"])  # this machine's clock may be behind
        self._begun_at = self._written_at = now

    @property
    def mark(self) -> dict[str, Any]:
        """Where and when, in unix seconds, the last checkpoint was complete; or else when training began.

        It goes into every version, so that the interval goes on over recoveries from memory: a job that fails more
        often than it persists would never persist. One that was begun and not finished does not count there.
        """
        at = self._written_at if self._persister.last_at is None else self._persister.last_at
        return {"directory": str(self.directory), "at": at}

    @property
    def wanted(self) -> bool:
        """Whether this rank wishes the next committed version to be written: rank 0 speaks for all."""
        due = time.time() - self._begun_at >= self._config.persist_every_s
        return due and self._identity.global_rank == 0 and not self._persister.busy

    def write(self, buffer: Buffer | None, version: VersionId | None) -> None:
        """Write the version that was just committed, as all ranks have agreed; returns at once."""
        self._begun_at = time.time()
        if buffer is not None and version is not None:
            self._persister.start(buffer, version)

    def close(self, *, finished: bool) -> None:
        """Finish what is being written; ``finished``: the job has ended well."""
        self._persister.close()
        if finished:
            self._persister.mark_finished()


def _default_directory(root_dir: str) -> Path:
    run_dir = os.environ.get("LIGHTNING_GEMINI_RUN_DIR")
    if run_dir:
        return Path(run_dir) / "persistent"
    return Path(root_dir).resolve() / "gemini" / standalone.job_id(sys.argv, os.getcwd())


def _deepspeed_files(stable: dict[str, Any], volatile: dict[str, Any]) -> dict[str, Any]:
    return ZeroState.files(stable, volatile, set_aside_positions(volatile["lightning"]))


def _recovery_scripts() -> tuple[Path, ...]:
    import deepspeed

    folder = Path(deepspeed.__file__).parent / "utils"
    return tuple(path for name in ("zero_to_fp32.py",) if (path := folder / name).exists())
