"""One schedule: a job, the faults that hit it, and what came of it; all from one seed."""

from __future__ import annotations

import gc
import logging
import random
from collections import Counter
from dataclasses import dataclass, field

from tests.simulation.cluster import Cluster
from tests.simulation.faults import Injector
from tests.simulation.mutations import mutated
from tests.simulation.parameters import Parameters
from tests.simulation.scheduler import Active, Scheduler
from tests.simulation.swap import simulated

_GRACE_S = 240.0


@dataclass(slots=True)
class Outcome:
    """What came of a schedule.

    Attributes:
        seed: Its seed.
        parameters: What it drew.
        violations: What broke, with the number of the invariant.
        faults: Faults by kind.
        recoveries: Restores by tier.
        checks: How often each invariant was looked at.
        virtual_s: How long it took on the virtual clock.
        dispatched: How often a simulated thread was switched to.
        fingerprint: Equal where every thread ran at the same time in the same order.
        trace: The last lines, if something broke.
    """

    seed: int
    parameters: Parameters
    violations: list[tuple[int, str]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0
    dispatched: int = 0
    fingerprint: int = 0
    trace: list[str] = field(default_factory=list)


def run_schedule(
    seed: int, machines: int | None = None, *, mutation: str | None = None, verbose: bool = False
) -> Outcome:
    """Runs the schedule of a seed to the end of its job.

    Args:
        seed: Draws the job, the cluster, every delay, every choice and every fault.
        machines: Machines of the job; drawn too where it is None.
        mutation: Name of a known bad protocol to put in.
        verbose: Keep the whole trace, with everything that the package logs.
    """
    parameters = Parameters.draw(random.Random(f"parameters {seed}"), machines)
    scheduler = Scheduler(seed)
    Active.scheduler = scheduler
    cluster = Cluster(scheduler, parameters)
    gc.disable()
    try:
        with simulated(cluster.note, logging.INFO if verbose else logging.WARNING), mutated(mutation):
            return _run(seed, parameters, scheduler, cluster)
    finally:
        gc.enable()


def _run(seed: int, parameters: Parameters, scheduler: Scheduler, cluster: Cluster) -> Outcome:
    injector = Injector(cluster, random.Random(f"faults {seed}"))
    cluster.start()
    injector.start()
    checks = cluster.checks

    def over() -> bool:
        stuck = injector.over and scheduler.now > injector.last_s + _GRACE_S
        return cluster.ended or stuck or bool(checks.violations)

    scheduler.run(over)
    if not checks.violations:
        _judge(cluster, injector)
    outcome = Outcome(
        seed,
        parameters,
        checks.violations,
        injector.counts,
        checks.recoveries,
        checks.done,
        scheduler.now,
        scheduler.dispatched,
        scheduler.fingerprint,
        list(cluster.trace),
    )
    scheduler.close()
    return outcome


def _judge(cluster: Cluster, injector: Injector) -> None:
    """The job must have ended, and well."""
    end, checks = cluster.launcher.end, cluster.checks
    if end is None:
        checks.stuck(f"no end {_GRACE_S:.0f} s after the last fault (at {injector.last_s:.1f} s)")
    elif not end.success:
        checks.stuck(f"the job was given up: {end.reason}")
    elif len(checks.steps) < cluster.parameters.machines * cluster.parameters.nproc_per_machine:
        checks.stuck("the job finished without all of its ranks")
