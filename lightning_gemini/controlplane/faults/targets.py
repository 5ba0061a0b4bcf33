"""Finds out what there is to hit in a running job."""

from __future__ import annotations

from collections.abc import Callable, Collection

from lightning_gemini.controlplane.faults.killing import etcd_members
from lightning_gemini.controlplane.faults.observer import Observer
from lightning_gemini.core.fault import GROUP, Targets
from lightning_gemini.core.placement import plan_placement


def find_targets(observer: Observer, kinds: Collection[str], pause: Callable[[], None]) -> Targets:
    """Waits until all workers of a job run, and describes the job.

    Args:
        observer: Of the job.
        kinds: What is to be done to it; placement groups are known only once a worker has joined its agent.
        pause: Waits a little; raises to give up.
    """
    job, groups = observer.job, None
    while not observer.look().in_order or (GROUP in kinds and (groups := _groups(observer)) is None):
        pause()
    domains = tuple(str(domain) for domain in job.get("domains") or ())
    return Targets(
        machines=job["nodes"],
        nproc_per_machine=job["nproc_per_node"],
        domains=domains,
        groups=groups or (),
        etcd_members=len(etcd_members(job)),
    )


def _groups(observer: Observer) -> tuple[tuple[int, ...], ...] | None:
    """The distinct sets of machines that hold some shard; None as long as no worker has said how many replicas."""
    report, machines = observer.report(0), observer.job["nodes"]
    if report is None or report.get("replicas") is None:
        return None
    known = {"domains": tuple(report["domains"])} if report.get("domains") else {}
    placement = plan_placement(machines, int(report["replicas"]), str(report["placement"]), **known)
    return tuple(sorted({tuple(sorted(placement.holders(machine))) for machine in range(machines)}))
