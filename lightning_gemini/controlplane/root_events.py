"""What the root is told, and what it does about it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gemini.controlplane.failure import Failure
from lightning_gemini.controlplane.membership import Assignment, Member, Spare
from lightning_gemini.controlplane.orders import Order, Outcome, Report


@dataclass(frozen=True, slots=True)
class JobShape:
    """What does not change while the job lives.

    Attributes:
        nodes: Slots.
        nproc_per_node: Workers on each machine.
        max_failures_without_progress: Recoveries in a row that complete no new step before the job is given up.
        report_timeout_s: Seconds that a member gets to answer a ``report`` order.
    """

    nodes: int
    nproc_per_node: int
    max_failures_without_progress: int
    report_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """An agent holds its slot; ``time`` in unix seconds, as everywhere here."""

    member: Member
    time: float


@dataclass(frozen=True, slots=True)
class MemberLost:
    """The lease of a slot's agent ended.

    ``grace_s``: the store itself was away, so everybody's lease may have ended; the agent gets so long to come back.
    """

    slot: int
    time: float
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SpareJoined:
    """An agent without a slot is there."""

    spare: Spare
    time: float


@dataclass(frozen=True, slots=True)
class SpareLost:
    """It is gone, or has a slot now."""

    name: str
    time: float


@dataclass(frozen=True, slots=True)
class Assigned:
    """An earlier root meant a slot for a spare."""

    slot: int
    assignment: Assignment
    time: float


@dataclass(frozen=True, slots=True)
class Evicted:
    """An earlier root gave up an agent that may still hold its lease."""

    slot: int
    incarnation: str
    time: float


@dataclass(frozen=True, slots=True)
class Reported:
    """An agent answered a ``report`` order."""

    report: Report
    time: float


@dataclass(frozen=True, slots=True)
class WorkersEnded:
    """Workers of a machine ended."""

    outcome: Outcome
    time: float


@dataclass(frozen=True, slots=True)
class JobEnded:
    """Somebody ended the job."""

    time: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes."""

    time: float


Event = (
    MemberJoined | MemberLost | SpareJoined | SpareLost | Assigned | Evicted | Reported | WorkersEnded | JobEnded | Tick
)


@dataclass(frozen=True, slots=True)
class PutOrder:
    """Publish an order."""

    order: Order


@dataclass(frozen=True, slots=True)
class Assign:
    """Mean a slot for a spare; None: for nobody any more."""

    slot: int
    assignment: Assignment | None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Give up a slot's machine.

    ``evict``: its agent still holds its lease, but does not answer; its provider must end it.
    """

    slot: int
    name: str
    incarnation: str
    evict: bool = False


@dataclass(frozen=True, slots=True)
class Announce:
    """Write to the event log: the failure that led to a generation, if any, and its start."""

    order: Order
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Finish:
    """End the job."""

    success: bool
    reason: str
    failure: Failure | None = None


Action = PutOrder | Assign | GiveUp | Announce | Finish
