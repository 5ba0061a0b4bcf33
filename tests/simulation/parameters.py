"""What a schedule's seed says about the job and the cluster it runs on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from lightning_gemini.config import CheckpointConfig


@dataclass(frozen=True, slots=True)
class Parameters:
    """A job and its cluster; times in (virtual) seconds.

    Attributes:
        machines: Machines of the job (N).
        nproc_per_machine: Ranks on each.
        replicas: Copies of every shard (m).
        placement: Strategy of the placement.
        steps: Optimizer steps.
        step_s: Duration of one.
        commit_wait_s: See `CheckpointConfig`.
        persist_every_s: Time between two persistent checkpoints.
        disk_write_s: Duration of a file operation of the persistent tier.
        latency_s: One way between machines.
        bytes_per_s: Of a link.
        pool_boot_s: How long a fork server imports.
        machine_boot_s: How long a replacement takes to come up.
        lease_ttl_s: Silence after which a machine is lost.
        clock_skew_s: How far wall clocks differ.
        report_timeout_s: See `JobSpec`.
        standby: Machines that stand by.
        faults: How many faults are injected.
    """

    machines: int
    nproc_per_machine: int
    replicas: int
    placement: str
    steps: int
    step_s: float
    commit_wait_s: float
    persist_every_s: float
    disk_write_s: float
    latency_s: float
    bytes_per_s: float
    pool_boot_s: float
    machine_boot_s: float
    lease_ttl_s: int
    clock_skew_s: float
    report_timeout_s: float
    standby: int
    faults: int

    @classmethod
    def draw(cls, dice: random.Random, machines: int | None = None) -> Parameters:
        """Draws a job; of ``machines`` machines, where that is given."""
        number = machines or dice.choice((2, 3, 3, 3, 4, 4, 5))
        replicas = min(number, dice.choice((1, 2, 2, 2, 2, 3)))
        drawn = cls(
            machines=number,
            nproc_per_machine=dice.choice((1, 1, 1, 2)) if number <= 3 else 1,
            replicas=replicas,
            placement=dice.choice(("mixed", "mixed", "ring")),
            steps=dice.randint(6, 20),
            step_s=_scattered(dice, 0.02, 0.3),
            commit_wait_s=_scattered(dice, 0.01, 1.0),
            persist_every_s=_scattered(dice, 0.3, 10.0),
            disk_write_s=_scattered(dice, 0.001, 0.3),
            latency_s=_scattered(dice, 0.0002, 0.01),
            bytes_per_s=_scattered(dice, 2e4, 1e8),
            pool_boot_s=_scattered(dice, 0.2, 2.0),
            machine_boot_s=_scattered(dice, 0.2, 3.0),
            lease_ttl_s=2,
            clock_skew_s=dice.choice((0.0, 0.1, 5.0)),
            report_timeout_s=dice.choice((4.0, 30.0)),
            standby=dice.choice((0, 0, 0, 1, 2)),
            faults=dice.randint(2, 6),
        )
        return drawn if number <= 8 else replace(drawn, steps=10, step_s=0.5, machine_boot_s=2.0)

    def config(self) -> CheckpointConfig:
        """The strategy's settings."""
        return CheckpointConfig(replicas=self.replicas, placement=self.placement, commit_wait_s=self.commit_wait_s)


def _scattered(dice: random.Random, least: float, most: float) -> float:
    """A value between the two, small ones as likely as large ones."""
    return float(least * (most / least) ** dice.random())
