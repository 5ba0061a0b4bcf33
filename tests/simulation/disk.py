"""The persistent tier: a shared directory with one checkpoint a version, written in the persister's order of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.errors import IntegrityError
from tests.simulation.scheduler import Active
from tests.simulation.threads import Thread

_OTHERS_TIMEOUT_S = 600.0
_POLL_S = 0.05
_KEEP = 2


@dataclass(slots=True)
class Disk:
    """What all machines share; a crash leaves what was done.

    Attributes:
        write_s: How long a file takes.
        failing: Whether writes end in an error.
        unfinished: Rank's files by attempt (step, generation).
        whole: Rank's files by step, once renamed.
        latest: The step that ``latest`` names.
    """

    write_s: float
    slow_until_s: float = 0.0
    failing_until_s: float = 0.0
    unfinished: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    whole: dict[int, dict[int, int]] = field(default_factory=dict)
    latest: int | None = None

    def operate(self) -> None:
        """One file operation, as long as it takes."""
        scheduler = Active.scheduler
        slow = scheduler.now < self.slow_until_s
        scheduler.sleep(self.write_s * (0.5 + scheduler.random.random()) * (50 if slow else 1))
        if scheduler.now < self.failing_until_s:
            raise OSError(28, "No space left on device")

    def resumable(self) -> list[int]:
        """Steps of whole checkpoints, best first."""
        newest = self.latest if self.latest is not None else -1
        return sorted(self.whole, key=lambda step: (step != self.latest, step > newest, -step))


class SimulatedPersister:
    """Writes committed versions of one rank in the background."""

    def __init__(self, disk: Disk, rank: int, world_size: int) -> None:
        self._disk, self._rank, self._world_size = disk, rank, world_size
        self._thread: Thread | None = None
        self.failures = 0

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, buffer: Buffer, version: VersionId) -> None:
        self._thread = Thread(target=self._run, args=(buffer, version, self._thread), name="persist")
        self._thread.start()

    def load(self, step: int) -> int | None:
        """This rank's state in a checkpoint, where it can be read."""
        self._disk.operate()
        return self._disk.whole.get(step, {}).get(self._rank)

    def _run(self, buffer: Buffer, version: VersionId, previous: Thread | None) -> None:
        try:
            weight = self._read(buffer, version)
            if previous is not None:
                previous.join(1.0)
                if previous.is_alive():
                    raise OSError("the one before it is still being written")
            self._write(version, weight)
        except (OSError, IntegrityError):
            self.failures += 1

    @staticmethod
    def _read(buffer: Buffer, version: VersionId) -> int:
        private = memoryview(bytearray(buffer.data[: buffer.data_bytes]))
        buffer.verify()
        if buffer.id != version:
            raise IntegrityError(f"version {version.version} was overwritten while it was being copied")
        state: dict[str, Any] = shard.read(private)[1]
        return int(state["weight"])

    def _write(self, version: VersionId, weight: int) -> None:
        disk, attempt = self._disk, (version.version, version.generation)
        disk.operate()
        disk.unfinished.setdefault(attempt, {})[self._rank] = weight
        if self._rank == 0:
            self._finish(attempt)

    def _finish(self, attempt: tuple[int, int]) -> None:
        disk, scheduler = self._disk, Active.scheduler
        deadline = scheduler.now + _OTHERS_TIMEOUT_S
        while len(disk.unfinished[attempt]) < self._world_size:
            if scheduler.now > deadline:
                raise OSError("other ranks wrote nothing")
            scheduler.sleep(_POLL_S)
        disk.operate()
        disk.whole[attempt[0]] = disk.unfinished.pop(attempt)
        disk.operate()
        disk.latest = attempt[0]
        for old in disk.resumable()[_KEEP:]:
            del disk.whole[old]
