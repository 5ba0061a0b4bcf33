"""The root's decisions, as a pure function: (state, event) → (state, actions).

No clock, no store, no thread: every order of joins, losses, exits and reports can be enumerated in a test.

::

    GATHERING ──all slots present──▶ REPORTING ──all reported──▶ RUNNING ──all finished──▶ DONE
        ▲                                │ member lost               │ member lost, worker failed
        └────────────────────────────────┴───────────────────────────┘
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lightning_gemini.controlplane.failure import Failure, classify, plan_from_reports
from lightning_gemini.controlplane.membership import Member
from lightning_gemini.controlplane.orders import REPORT, START, Order, Outcome, Report
from lightning_gemini.controlplane.root_events import (
    Action,
    Announce,
    Event,
    Finish,
    JobShape,
    MemberJoined,
    MemberLost,
    PutOrder,
    Reported,
    RequestReplacement,
    Tick,
    WorkersEnded,
)
from lightning_gemini.core.recovery import RecoveryPlan
from lightning_gemini.errors import GeminiError

__all__ = ["Phase", "RootState", "rebuild", "step"]


class Phase(enum.Enum):
    """Where the job stands."""

    GATHERING = "gathering"
    REPORTING = "reporting"
    RUNNING = "running"
    DONE = "done"


Decision = tuple["RootState", tuple[Action, ...]]


@dataclass(frozen=True, slots=True)
class RootState:
    """All that the root knows.

    Attributes:
        shape: The job's.
        phase: Where the job stands.
        order: The newest order, None before the first.
        members: Present members by slot.
        reports: Answers to ``order`` by slot.
        finished: Slots whose workers all ended well.
        lost_at: When the first member was lost since the last start.
        awaited: Slots that a new root does not miss yet, with the time at which it will.
    """

    shape: JobShape
    phase: Phase = Phase.GATHERING
    order: Order | None = None
    members: Mapping[int, Member] = field(default_factory=dict)
    reports: Mapping[int, Report] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()
    lost_at: float | None = None
    awaited: Mapping[int, float] = field(default_factory=dict)

    @property
    def generation(self) -> int:
        """Newest generation ordered; 0 before the first."""
        return 0 if self.order is None else self.order.generation

    def current(self, answer: Report | Outcome) -> bool:
        """Says whether an answer comes from a present member and belongs to the newest order."""
        member = self.members.get(answer.machine)
        known = member is not None and member.incarnation == answer.incarnation
        return known and answer.generation == self.generation


def step(state: RootState, event: Event) -> Decision:
    """Takes one event into account."""
    if state.phase is Phase.DONE:
        return state, ()
    match event:
        case MemberJoined(member, time):
            return _joined(state, member, time)
        case MemberLost(slot, time):
            return _lost(state, slot, time)
        case Reported(report, time):
            return _reported(state, report, time)
        case WorkersEnded(outcome):
            return _ended(state, outcome)
        case Tick(time):
            return _miss_awaited(state, time)


def rebuild(shape: JobShape, order: Order | None, events: Iterable[Event], awaited: Mapping[int, float]) -> Decision:
    """Gives a newly elected root its predecessor's knowledge.

    Args:
        shape: The job's.
        order: The newest order in the store.
        events: What the store holds: losses of members that the order names, joins, reports, outcomes.
        awaited: Slots that are absent, but only because the store may have dropped everyone's lease: slot → the time
            (unix seconds) from which on they count as lost.
    """
    state = RootState(shape)
    if order is not None:
        phase = Phase.RUNNING if order.phase == START else Phase.REPORTING
        members = {member.machine: member for member in order.members}
        state = replace(state, phase=phase, order=order, members=members, awaited=awaited)
    actions: tuple[Action, ...] = ()
    for event in events:
        state, more = step(state, event)
        actions += more
    return state, actions


def _joined(state: RootState, member: Member, time: float) -> Decision:
    slot, before = member.machine, state.members.get(member.machine)
    awaited = {other: until for other, until in state.awaited.items() if other != slot}
    state = replace(state, awaited=awaited)
    if before is not None and before.incarnation == member.incarnation:
        return _gather(state)
    if before is not None:
        state, _ = _lost(state, slot, time)  # its successor is here already: no replacement needed
    return _gather(replace(state, members={**state.members, slot: member}))


def _lost(state: RootState, slot: int, time: float) -> Decision:
    member = state.members.get(slot)
    if member is None:
        return state, ()
    members = {other: present for other, present in state.members.items() if other != slot}
    awaited = {other: until for other, until in state.awaited.items() if other != slot}
    lost_at = time if state.lost_at is None else state.lost_at
    state = replace(state, phase=Phase.GATHERING, members=members, awaited=awaited, lost_at=lost_at)
    return state, (RequestReplacement(slot, member.incarnation),)


def _miss_awaited(state: RootState, time: float) -> Decision:
    actions: tuple[Action, ...] = ()
    for slot in [slot for slot, until in state.awaited.items() if until <= time]:
        state, more = _lost(state, slot, time)
        actions += more
    return state, actions


def _ended(state: RootState, outcome: Outcome) -> Decision:
    if state.phase is not Phase.RUNNING or not state.current(outcome):
        return state, ()
    if outcome.fatal is not None:
        return _finish(state, False, outcome.fatal)
    if outcome.exits:
        return _gather(replace(state, phase=Phase.GATHERING))
    if not outcome.finished:
        return state, ()
    state = replace(state, finished=state.finished | {outcome.machine})
    if len(state.finished) < state.shape.nodes:
        return state, ()
    return _finish(state, True, "all workers finished")


def _gather(state: RootState) -> Decision:
    """Opens the next generation once every slot is present."""
    if state.phase is not Phase.GATHERING or len(state.members) < state.shape.nodes or state.awaited:
        return state, ()
    last = state.order
    order = Order(
        generation=state.generation + 1,
        phase=REPORT,
        members=tuple(state.members[slot] for slot in sorted(state.members)),
        running={} if last is None else last.running,
        failures=0 if last is None else last.failures,
        last_step=0 if last is None else last.last_step,
        plan=None if last is None else last.plan,
    )
    return replace(state, phase=Phase.REPORTING, order=order, reports={}, finished=frozenset()), (PutOrder(order),)


def _reported(state: RootState, report: Report, time: float) -> Decision:
    if state.phase is not Phase.REPORTING or not state.current(report):
        return state, ()
    state = replace(state, reports={**state.reports, report.machine: report})
    if len(state.reports) < state.shape.nodes:
        return state, ()
    return _start(state, time)


def _start(state: RootState, time: float) -> Decision:
    order, reports = state.order, state.reports
    assert order is not None
    failure = classify(order, reports, state.lost_at or time) if order.running else None
    try:
        plan = plan_from_reports(reports, state.shape.nodes, state.shape.nproc_per_node)
    except GeminiError as error:
        return _finish(state, False, str(error), failure)
    last_step = max((step for report in reports.values() if (step := report.last_step()) is not None), default=0)
    failures = 0 if failure is None or _progressed(order, last_step) else order.failures + 1
    if failure is not None and failures > state.shape.max_failures_without_progress:
        reason = f"{failures} failures in a row without a new completed step (newest: {last_step}); {failure.detail}"
        return _finish(state, False, reason, failure)
    order = _start_order(order, reports, plan, failures, last_step)
    return replace(state, phase=Phase.RUNNING, order=order, lost_at=None), (PutOrder(order), Announce(order, failure))


def _start_order(
    order: Order, reports: Mapping[int, Report], plan: RecoveryPlan, failures: int, last_step: int
) -> Order:
    return replace(
        order,
        phase=START,
        running={member.machine: member.incarnation for member in order.members},
        failures=failures,
        last_step=last_step,
        plan=plan,
        master_port=reports[0].master_port,
    )


def _progressed(order: Order, last_step: int) -> bool:
    """Says whether the failed generation completed a step that no earlier one had.

    One that restarted from the persistent tier runs behind the newest step ever seen: there any movement counts.
    """
    from_memory = order.plan is not None and order.plan.id is not None
    return last_step > order.last_step or (not from_memory and last_step != order.last_step)


def _finish(state: RootState, success: bool, reason: str, failure: Failure | None = None) -> Decision:
    return replace(state, phase=Phase.DONE), (Finish(success, reason, failure),)
