"""Every default of the package, once.

Hydra configs, the strategy's arguments and the command line all resolve to these dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_gemini.errors import ConfigurationError

PLACEMENTS = ("mixed", "group", "ring", "compact", "rack")
TRANSPORTS = ("tcp",)


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """How the strategy checkpoints.

    Attributes:
        replicas: Copies of every shard, the owner's own included (m in GEMINI). 1 protects against process death only;
            ``None`` means 2, or 1 where there is but one machine.
        placement: Which machines hold whose shards: ``mixed`` (GEMINI, Algorithm 1), ``group``, ``ring``, ``compact``
            or ``rack``.
        domains: Failure domain of every machine, by machine rank; ``None`` with placement ``rack`` takes what the
            machines say themselves (``LIGHTNING_GEMINI_DOMAIN``).
        checkpoint_every: Optimizer steps between two versions.
        commit_wait_s: The longest that a step waits for its predecessor's replicas before that version is skipped.
        persist_dir: Directory of the persistent tier; ``None`` picks one inside the run directory or
            ``default_root_dir``.
        persist_every_s: Seconds between two persistent checkpoints; 0 turns the tier off.
        transport: How replicas travel.
        idle_timeout_s: An agent that no worker uses goes away after this many seconds and frees its memory.
    """

    replicas: int | None = None
    placement: str = "mixed"
    domains: tuple[str, ...] | None = None
    checkpoint_every: int = 1
    commit_wait_s: float = 1.0
    persist_dir: Path | None = None
    persist_every_s: float = 3 * 3600.0
    transport: str = "tcp"
    idle_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.replicas is not None and self.replicas < 1:
            raise ConfigurationError(f"replicas must be 1 or more (the owner's own copy counts), got {self.replicas}")
        if self.checkpoint_every < 0:
            raise ConfigurationError(f"checkpoint_every must be 0 (off) or more, got {self.checkpoint_every}")
        if self.commit_wait_s < 0 or self.persist_every_s < 0 or self.idle_timeout_s <= 0:
            raise ConfigurationError("commit_wait_s and persist_every_s must not be negative, idle_timeout_s positive")
        for name, value, known in (
            ("placement", self.placement, PLACEMENTS),
            ("transport", self.transport, TRANSPORTS),
        ):
            if value not in known:
                raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def replicas_for(self, machines: int) -> int:
        """The number of copies on a job of that many machines.

        Raises:
            ConfigurationError: More replicas were asked for than there are machines.
        """
        if self.replicas is None:
            return min(2, machines)
        if self.replicas > machines:
            raise ConfigurationError(
                f"replicas={self.replicas} needs as many machines, this job has {machines}: "
                f"use replicas between 1 and {machines}, or more machines"
            )
        return self.replicas


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How machines find and watch each other.

    Attributes:
        lease_ttl_s: Seconds after which a silent machine is declared dead.
        max_failures_without_progress: Recoveries in a row that complete no new step before the job is given up.
        stop_timeout_s: Seconds that processes get to end before they are killed.
        report_timeout_s: Seconds that a machine that shows signs of life gets to say what it holds, before it is given
            up and replaced.
    """

    lease_ttl_s: int = 2
    max_failures_without_progress: int = 3
    stop_timeout_s: float = 5.0
    report_timeout_s: float = 30.0


MEMORY_FLOOR_BYTES = 256 * 2**20
"""Host memory that the buffers must leave free."""
