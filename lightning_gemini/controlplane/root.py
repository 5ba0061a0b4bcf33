"""The root's decisions, as a pure function: (state, event) → (state, actions).

No clock, no store, no thread: every order of joins, losses, exits and reports can be enumerated in a test.

::

    GATHERING ──all slots present──▶ REPORTING ──all reported──▶ RUNNING ──all finished──▶ DONE
        ▲                                │ member lost or silent     │ member lost, worker failed
        └────────────────────────────────┴───────────────────────────┘

A lost member that comes back before anything else happened is as if it had never been away: its process, and so its
memory and its workers, are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lightning_gemini.controlplane.membership import Member, Spare
from lightning_gemini.controlplane.orders import REPORT, START, Order, Outcome, Report
from lightning_gemini.controlplane.root_events import (
    Action,
    Assigned,
    Event,
    Evicted,
    Finish,
    GiveUp,
    JobEnded,
    JobShape,
    MemberJoined,
    MemberLost,
    PutOrder,
    Reported,
    SpareJoined,
    SpareLost,
    Tick,
    WorkersEnded,
)
from lightning_gemini.controlplane.root_state import Phase, RootState
from lightning_gemini.controlplane.starting import start_generation
from lightning_gemini.controlplane.vacancies import fill_vacancies

__all__ = ["Phase", "RootState", "rebuild", "step"]

Decision = tuple[RootState, tuple[Action, ...]]


def step(state: RootState, event: Event) -> Decision:
    """Takes one event into account."""
    if state.phase is Phase.DONE:
        return state, ()
    state, actions = _take(state, event)
    return _settle(state, actions, event.time)


def rebuild(shape: JobShape, order: Order | None, events: Iterable[Event], time: float) -> Decision:
    """Gives a newly elected root its predecessor's knowledge; decides nothing before it has all of it.

    Args:
        shape: The job's.
        order: The newest order in the store.
        events: What the store holds: who was given up, absent members that the order names, present ones, spares,
            assignments, reports, outcomes.
        time: Now, unix seconds.
    """
    state = RootState(shape)
    if order is not None:
        phase = Phase.RUNNING if order.phase == START else Phase.REPORTING
        members = {member.machine: member for member in order.members}
        state = replace(state, phase=phase, order=order, ordered_at=time, members=members)
    actions: tuple[Action, ...] = ()
    for event in events:
        state, more = _take(state, event)
        actions += more
    return _settle(state, actions, time)


def _take(state: RootState, event: Event) -> Decision:
    match event:
        case MemberJoined(member, time):
            return _joined(state, member, time)
        case MemberLost(slot, time, grace_s):
            return _lost(state, slot, time) if grace_s <= 0 else (_await(state, slot, time + grace_s), ())
        case SpareJoined(spare):
            return _spare_joined(state, spare), ()
        case SpareLost(name):
            return replace(state, spares={key: each for key, each in state.spares.items() if key != name}), ()
        case Assigned(slot, assignment):
            return replace(state, assigned={**state.assigned, slot: assignment}), ()
        case Evicted(slot, incarnation, time):
            return _given_up(state, slot, incarnation, time), ()
        case Reported(report):
            return _reported(state, report), ()
        case WorkersEnded(outcome):
            return _ended(state, outcome)
        case JobEnded():
            return replace(state, phase=Phase.DONE), ()
        case Tick(time):
            return _tick(state, time)


def _settle(state: RootState, actions: tuple[Action, ...], time: float) -> Decision:
    """Goes on to the next phase where nothing is missing, and fills what is vacant."""
    for advance in (_gather, _start, _conclude):
        if state.phase is not Phase.DONE:
            state, more = advance(state, time)
            actions += more
    if state.phase is not Phase.DONE:
        state, more = fill_vacancies(state)
        actions += more
    return state, actions


# -- who is there ----------------------------------------------------------------------------------------------------


def _joined(state: RootState, member: Member, time: float) -> Decision:
    slot, before = member.machine, state.members.get(member.machine)
    if member.incarnation in state.given_up or not 0 <= slot < state.shape.nodes:
        return state, ()
    spares = {name: spare for name, spare in state.spares.items() if spare.incarnation != member.incarnation}
    awaited = {other: until for other, until in state.awaited.items() if other != slot}
    state = replace(state, awaited=awaited, spares=spares)
    actions: tuple[Action, ...] = ()
    if before is not None and before.incarnation != member.incarnation:
        state, actions = _lost(state, slot, time)  # its successor is here already
    return replace(state, members={**state.members, slot: member}), actions


def _lost(state: RootState, slot: int, time: float, evict: bool = False) -> Decision:
    member = state.members.get(slot)
    if member is None:
        return state, ()
    members = {other: present for other, present in state.members.items() if other != slot}
    awaited = {other: until for other, until in state.awaited.items() if other != slot}
    reports = {other: report for other, report in state.reports.items() if other != slot}
    lost_at = time if state.lost_at is None else state.lost_at
    finished = state.finished - {slot}  # it says so again when it comes back
    state = replace(state, members=members, awaited=awaited, reports=reports, lost_at=lost_at, finished=finished)
    return replace(state, phase=Phase.GATHERING), (GiveUp(slot, member.name, member.incarnation, evict),)


def _await(state: RootState, slot: int, until: float) -> RootState:
    if slot not in state.members or slot in state.awaited:
        return state
    return replace(state, awaited={**state.awaited, slot: until})


def _spare_joined(state: RootState, spare: Spare) -> RootState:
    if any(member.incarnation == spare.incarnation for member in state.members.values()):
        return state  # it has taken a slot, and its record as a spare is about to go
    return replace(state, spares={**state.spares, spare.name: spare})


def _given_up(state: RootState, slot: int, incarnation: str, time: float) -> RootState:
    state = replace(state, given_up=state.given_up | {incarnation})
    member = state.members.get(slot)
    return _lost(state, slot, time)[0] if member is not None and member.incarnation == incarnation else state


def _tick(state: RootState, time: float) -> Decision:
    """Misses those that were awaited for long enough, and gives up those that live but do not answer."""
    actions: tuple[Action, ...] = ()
    for slot in [slot for slot, until in state.awaited.items() if until <= time]:
        state, more = _lost(state, slot, time)
        actions += more
    if state.phase is Phase.REPORTING and time - state.ordered_at > state.shape.report_timeout_s:
        for slot in sorted(set(state.members) - set(state.reports)):
            given_up = state.given_up | {state.members[slot].incarnation}
            state, more = _lost(replace(state, given_up=given_up), slot, time, evict=True)
            actions += more
    return state, actions


# -- how the generation fares ----------------------------------------------------------------------------------------


def _reported(state: RootState, report: Report) -> RootState:
    if state.phase is Phase.RUNNING or not state.current(report):
        return state
    return replace(state, reports={**state.reports, report.machine: report})


def _ended(state: RootState, outcome: Outcome) -> Decision:
    started = state.order is not None and state.order.phase == START
    if not started or not state.current(outcome):
        return state, ()
    if outcome.fatal is not None:
        return replace(state, phase=Phase.DONE), (Finish(False, outcome.fatal),)
    if outcome.exits:
        return replace(state, phase=Phase.GATHERING, failed=True), ()
    finished = state.finished | {outcome.machine} if outcome.finished else state.finished
    return replace(state, finished=finished), ()


def _gather(state: RootState, time: float) -> Decision:
    """Opens the next generation once every slot has a member; goes on with this one where nothing has changed."""
    if state.phase is not Phase.GATHERING or not state.complete:
        return state, ()
    last = state.order
    if last is not None and state.unchanged and not state.failed:
        phase = Phase.RUNNING if last.phase == START else Phase.REPORTING
        # A generation that is only reporting may be the answer to a loss, whose time it will tell.
        lost_at = None if phase is Phase.RUNNING else state.lost_at
        return replace(state, phase=phase, ordered_at=time, lost_at=lost_at), ()
    order = Order(
        generation=state.generation + 1,
        phase=REPORT,
        members=tuple(state.members[slot] for slot in sorted(state.members)),
        running={} if last is None else last.running,
        failures=0 if last is None else last.failures,
        last_step=0 if last is None else last.last_step,
        plan=None if last is None else last.plan,
    )
    state = replace(state, phase=Phase.REPORTING, order=order, ordered_at=time, failed=False)
    return replace(state, reports={}, finished=frozenset()), (PutOrder(order),)


def _start(state: RootState, time: float) -> Decision:
    if state.phase is not Phase.REPORTING or state.awaited or len(state.reports) < state.shape.nodes:
        return state, ()
    return start_generation(state, time)


def _conclude(state: RootState, time: float) -> Decision:
    if state.phase is not Phase.RUNNING or len(state.finished) < state.shape.nodes:
        return state, ()
    return replace(state, phase=Phase.DONE), (Finish(True, "all workers finished"),)
