"""All that the root knows."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_gemini.controlplane.membership import Assignment, Member, Spare
from lightning_gemini.controlplane.orders import Order, Outcome, Report
from lightning_gemini.controlplane.root_events import JobShape


class Phase(enum.Enum):
    """Where the job stands."""

    GATHERING = "gathering"
    REPORTING = "reporting"
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class RootState:
    """All that the root knows.

    Attributes:
        shape: The job's.
        phase: Where the job stands.
        order: The newest order, None before the first.
        ordered_at: When ``order`` was given, as far as this root knows.
        members: Present members by slot.
        reports: Answers to ``order`` by slot.
        finished: Slots whose workers all ended well.
        failed: Whether workers of the newest generation ended badly: only a new generation helps then.
        lost_at: When the first member was lost since the last start.
        awaited: Slots that the root does not miss yet, with the time at which it will.
        spares: Agents without a slot, by name.
        assigned: Vacant slots that are meant for a spare.
        given_up: Incarnations that do not count any more, although they may hold their lease.
    """

    shape: JobShape
    phase: Phase = Phase.GATHERING
    order: Order | None = None
    ordered_at: float = 0.0
    members: Mapping[int, Member] = field(default_factory=dict)
    reports: Mapping[int, Report] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()
    failed: bool = False
    lost_at: float | None = None
    awaited: Mapping[int, float] = field(default_factory=dict)
    spares: Mapping[str, Spare] = field(default_factory=dict)
    assigned: Mapping[int, Assignment] = field(default_factory=dict)
    given_up: frozenset[str] = frozenset()

    @property
    def generation(self) -> int:
        """Newest generation ordered; 0 before the first."""
        return 0 if self.order is None else self.order.generation

    @property
    def complete(self) -> bool:
        """Says whether every slot has a member, and none is only awaited."""
        return len(self.members) == self.shape.nodes and not self.awaited

    @property
    def unchanged(self) -> bool:
        """Says whether the members are the very ones that the newest order names."""
        order = self.order
        return order is not None and all(
            (present := self.members.get(member.machine)) is not None and present.incarnation == member.incarnation
            for member in order.members
        )

    def current(self, answer: Report | Outcome) -> bool:
        """Says whether an answer comes from a present member and belongs to the newest order."""
        member = self.members.get(answer.machine)
        known = member is not None and member.incarnation == answer.incarnation
        return known and answer.generation == self.generation
