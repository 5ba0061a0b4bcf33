"""What a failure was, and what memory can do about it: read from the agents' reports. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_gemini.controlplane.orders import Order, RankExit, Report
from lightning_gemini.core.placement import plan_placement
from lightning_gemini.core.recovery import RecoveryPlan, Tier, inventory_from_json, plan_recovery
from lightning_gemini.errors import LayoutMismatchError

SOFTWARE = "software"
HARDWARE = "hardware"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a generation ended.

    Attributes:
        kind: ``hardware`` if a machine was lost, else ``software``.
        node: Machine rank of the cause.
        detail: What happened, in words.
        nodes_lost: Machines that were lost.
        time: When it was first seen, unix seconds.
        generation: The generation that it ended.
    """

    kind: str
    node: int
    detail: str
    nodes_lost: tuple[int, ...]
    time: float
    generation: int


def classify(order: Order, reports: Mapping[int, Report], lost_at: float) -> Failure:
    """Finds the cause of the failure that ``order`` answers.

    Peers of a dead worker end as well, with an exception and code 1: they are not the cause, and a killed rank comes
    before them. A lost machine comes before everything.

    Args:
        order: The ``report`` order, with the members that ran before.
        reports: Everyone's answer.
        lost_at: When a machine was found lost, unix seconds.
    """
    lost = tuple(m.machine for m in order.members if order.running.get(m.machine) != m.incarnation)
    failed = order.generation - 1
    if lost:
        names = ", ".join(str(machine) for machine in lost)
        detail = f"lost node{'s' if len(lost) > 1 else ''} {names}: no sign of life within the lease"
        return Failure(HARDWARE, lost[0], detail, lost, lost_at, failed)
    exits = [(leave, machine) for machine, report in reports.items() for leave in report.exits]
    if not exits:
        return Failure(SOFTWARE, 0, "the control plane lost its members for a while", (), lost_at, failed)
    exits.sort(key=lambda item: _as_cause(item[0]))
    causes = [item for item in exits if item[0].signal == exits[0][0].signal] if exits[0][0].signal else exits[:1]
    first_seen = min(leave.time for leave, _ in exits)
    return Failure(SOFTWARE, exits[0][1], "; ".join(str(leave) for leave, _ in causes), (), first_seen, failed)


def _as_cause(leave: RankExit) -> tuple[int, float]:
    """Orders exits by how likely they are a cause: SIGKILL, other signals, exit codes; then by time."""
    severity = 0 if leave.signal == "SIGKILL" else 1 if leave.signal else 2
    return severity, leave.time


def plan_from_reports(reports: Mapping[int, Report], nodes: int, nproc_per_node: int) -> RecoveryPlan:
    """Plans the recovery; the placement comes from the agents, who learnt it from the strategy in their workers.

    Raises:
        LayoutMismatchError: If the memory belongs to another world size.
        PlacementError: If the reported placement is impossible.
    """
    memories = [report.memory for report in reports.values()]
    for memory in memories:
        if "error" in memory:
            raise LayoutMismatchError(str(memory["error"]))
    known = next((memory for memory in memories if memory.get("replicas")), None)
    if known is None:
        return RecoveryPlan(None, (Tier.NONE,) * (nodes * nproc_per_node))
    placement = plan_placement(nodes, int(known["replicas"]), known["placement"] or "mixed", known.get("domains"))
    return plan_recovery(placement, nproc_per_node, [inventory_from_json(memory) for memory in memories])
