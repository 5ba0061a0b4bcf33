"""Every default of the package, once.

Hydra configs, the strategy's arguments and the command line all resolve to these dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_gemini.errors import ConfigurationError

MIN_CHUNK_BYTES = 4096
"""Smallest chunk of a schedule."""
PLACEMENTS = ("mixed", "group", "ring", "compact", "rack")
TRANSPORTS = ("tcp", "p2p")
SCHEDULES = ("interleaved", "unpipelined", "naive", "eager", "blocking", "none")


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
        transport: How replicas travel: ``tcp`` (agent to agent) or ``p2p`` (worker to worker over torch.distributed, on
            CUDA with NCCL through ``sub_buffers`` in device memory).
        schedule: When they travel: ``interleaved`` (GEMINI: chunks in the network's idle spans), ``unpipelined`` (one
            chunk at a time in them), ``naive`` (one chunk a span), ``eager`` (at once), ``blocking`` (training waits),
            or ``none`` (no checkpoints).
        profile_iterations: Iterations without checkpoint traffic that a profile of the idle spans takes.
        overhead_budget: What an iteration may take longer because of checkpoints, as a fraction; where the idle spans
            are too short for that, versions are taken less often.
        buffer_bytes: Most bytes in flight (R in GEMINI); ``None``: 128 MiB with transport ``p2p``, and with ``tcp``
            what the link carries in a few milliseconds.
        sub_buffers: Chunks that these are cut into (p in GEMINI).
        safety: Part of a mean idle span that is used (μ in GEMINI); the rest is for the spans' variance.
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
    schedule: str = "interleaved"
    profile_iterations: int = 20
    overhead_budget: float = 0.01
    buffer_bytes: int | None = None
    sub_buffers: int = 4
    safety: float = 0.8
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
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in known:
                raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.profile_iterations < 1:
            raise ConfigurationError(f"profile_iterations must be 1 or more, got {self.profile_iterations}")
        if not self.overhead_budget > 0:
            raise ConfigurationError(f"overhead_budget must be above 0, as 0.01 for 1 %, got {self.overhead_budget}")
        if not 0 < self.safety <= 1:
            raise ConfigurationError(f"safety must be above 0 and at most 1, got {self.safety}")
        if self.sub_buffers < 1:
            raise ConfigurationError(f"sub_buffers must be 1 or more, got {self.sub_buffers}")
        if self.buffer_bytes is not None and self.buffer_bytes < self.sub_buffers * MIN_CHUNK_BYTES:
            raise ConfigurationError(
                f"buffer_bytes must hold {self.sub_buffers} chunks of {MIN_CHUNK_BYTES} bytes or more, "
                f"got {self.buffer_bytes}"
            )

    @property
    def enabled(self) -> bool:
        """Whether there are versions at all."""
        return self.checkpoint_every > 0 and self.schedule != "none"

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


P2P_BUFFER_BYTES = 128 << 20
"""What transport ``p2p`` reserves on the receiver where nothing else is set: R in GEMINI."""

MEMORY_FLOOR_BYTES = 256 * 2**20
"""Host memory that the buffers must leave free."""
