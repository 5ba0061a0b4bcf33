"""What the root is told, and what it does about it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gemini.controlplane.failure import Failure
from lightning_gemini.controlplane.membership import Member
from lightning_gemini.controlplane.orders import Order, Outcome, Report


@dataclass(frozen=True, slots=True)
class JobShape:
    """What does not change while the job lives."""

    nodes: int
    nproc_per_node: int
    max_failures_without_progress: int


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """An agent holds its slot; ``time`` in unix seconds, as everywhere here."""

    member: Member
    time: float


@dataclass(frozen=True, slots=True)
class MemberLost:
    """The lease of a slot's agent ended."""

    slot: int
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
class Tick:
    """Time passes."""

    time: float


Event = MemberJoined | MemberLost | Reported | WorkersEnded | Tick


@dataclass(frozen=True, slots=True)
class PutOrder:
    """Publish an order."""

    order: Order


@dataclass(frozen=True, slots=True)
class RequestReplacement:
    """Ask for a machine in place of that incarnation."""

    slot: int
    incarnation: str


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


Action = PutOrder | RequestReplacement | Announce | Finish
