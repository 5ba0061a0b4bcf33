"""A small world around the root's real decisions: machines that join, work, die, and lose their lease for a while."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning_gemini.controlplane.membership import Assignment, Member, Spare
from lightning_gemini.controlplane.orders import REPORT, START, Order, Outcome, RankExit, Report
from lightning_gemini.controlplane.root import Phase, RootState, rebuild, step
from lightning_gemini.controlplane.root_events import (
    Assign,
    Assigned,
    Event,
    Finish,
    JobShape,
    MemberJoined,
    MemberLost,
    PutOrder,
    Reported,
    SpareJoined,
    SpareLost,
    WorkersEnded,
)

NODES = 2
SHAPE = JobShape(NODES, 1, max_failures_without_progress=100)
NOW = 5.0


def member(slot: int, machine: int | None = None, domain: str = "") -> Member:
    number = slot if machine is None else machine
    return Member(slot, "127.0.0.1", 7000 + number, 100 + number, f"i{number}", f"machine-{number}", domain)


def spare(machine: int, domain: str = "") -> Spare:
    return Spare(f"machine-{machine}", "127.0.0.1", 100 + machine, f"i{machine}", domain)


def report(
    slot: int, generation: int, machine: int | None = None, exits: tuple[RankExit, ...] = (), **memory: Any
) -> Report:
    incarnation = f"i{slot if machine is None else machine}"
    return Report(slot, generation, incarnation, 9000, {"machine": slot, "holdings": [], **memory}, exits)


@dataclass(frozen=True)
class Machine:
    """One machine and its agent, under its own number.

    ``slot``: the one it holds; ``wants``: an assignment that it saw, and may act on late; ``away``: its lease is lost,
    though it lives; ``obeyed``: its newest order; ``workers``: whether they run, ended well or badly.
    """

    number: int
    slot: int | None = None
    wants: int | None = None
    away: bool = False
    obeyed: tuple[int, bool] = (0, False)
    workers: str = "none"

    @property
    def incarnation(self) -> str:
        return f"i{self.number}"


@dataclass(frozen=True)
class World:
    """The job, its machines and its store.

    ``machines`` are those that live, ``assigned`` and the root's order what the store holds, ``queue`` what the root
    was not told yet; the rest counts what may still go wrong.
    """

    root: RootState
    machines: tuple[Machine, ...]
    queue: tuple[Event, ...] = ()
    assigned: tuple[int | None, ...] = (None,) * NODES
    started: int = NODES
    standby: int = 0
    kills: int = 0
    blips: int = 0
    crashes: int = 0
    takeovers: int = 0
    result: bool | None = None

    @property
    def order(self) -> Order | None:
        return self.root.order

    def holder(self, slot: int) -> Machine | None:
        return next((each for each in self.machines if each.slot == slot and not each.away), None)

    def key(self) -> Any:
        root, order = self.root, self.root.order
        ordered = order and (order.rank, tuple(each.incarnation for each in order.members), *order.running.values())
        members = tuple(sorted((slot, each.incarnation) for slot, each in root.members.items()))
        who = (members, frozenset(root.spares), frozenset(root.assigned.items()), root.finished)
        left = (self.started, self.kills, self.blips, self.crashes, self.takeovers, self.result)
        known = (root.phase, ordered, root.failed, frozenset(root.reports))
        return known, who, self.machines, repr(self.queue), self.assigned, left


def put(world: World, old: Machine, new: Machine | None) -> World:
    changed = tuple(new if each is old else each for each in world.machines)
    return replace(world, machines=tuple(each for each in changed if each is not None))


def say(world: World, *events: Event) -> World:
    return replace(world, queue=(*world.queue, *events))


def apply(world: World, state: RootState, actions: tuple[Any, ...]) -> World:
    newest = world.root.order.rank if world.root.order else (0, False)
    assigned = list(world.assigned)
    for action in actions:
        assert world.result is None, "a finished job stays finished"
        match action:
            case PutOrder(order):
                assert order.rank > newest, "orders only ever get newer"
                newest = order.rank
                if order.phase == START:
                    check_nobody_runs(world, order)
            case Assign(slot, assignment):
                assigned[slot] = None if assignment is None else int(assignment.incarnation[1:])
            case Finish(success, _):
                world = replace(world, result=success)
    check_assignments(state, assigned)
    return replace(world, root=state, assigned=tuple(assigned))


def check_nobody_runs(world: World, order: Order) -> None:
    """No worker of an older generation may run when the next starts: its replicas would mix with the new ones."""
    for machine in world.machines:
        if machine.slot is not None and machine.incarnation == order.members[machine.slot].incarnation:
            assert machine.obeyed == (order.generation, False)
            assert machine.workers == "none"


def check_assignments(state: RootState, assigned: list[int | None]) -> None:
    """One spare for a slot, one slot for a spare, one member for a slot; nobody is meant for a slot that is taken."""
    holders = [each.incarnation for each in state.members.values()]
    assert len(holders) == len(set(holders)), "one agent has two slots"
    if state.phase is Phase.DONE:
        return
    names = [assignment.name for assignment in state.assigned.values()]
    assert len(names) == len(set(names)), "a spare was meant for two slots"
    assert not set(state.assigned) & set(state.members), "a slot that is taken was given away"
    assert all(name in state.spares for name in names), "somebody who is not there was chosen"
    for slot, assignment in state.assigned.items():
        assert assigned[slot] == int(assignment.incarnation[1:]), "the store says something else"


def answers_of(machine: Machine) -> Iterator[Event]:
    """What an agent has written below its lease."""
    slot = machine.slot
    assert slot is not None
    generation, started = machine.obeyed
    if generation:
        yield Reported(report(slot, generation, machine.number), NOW)
    if started and machine.workers in ("good", "bad"):
        exits = (RankExit(slot, 1, None, "SIGKILL", 0.0),) if machine.workers == "bad" else ()
        outcome = Outcome(slot, generation, machine.incarnation, machine.workers == "good", exits)
        yield WorkersEnded(outcome, NOW)


def moves(world: World) -> Iterator[World]:
    if world.queue:
        event, *rest = world.queue
        yield apply(replace(world, queue=tuple(rest)), *step(world.root, event))
    for machine in world.machines:
        if machine.away:
            yield come_back(world, machine)
        elif machine.slot is None:
            yield from spare_moves(world, machine)
        else:
            yield from member_moves(world, machine)
        if world.kills:
            yield lose(replace(world, kills=world.kills - 1), machine, None)
        if world.blips and not machine.away:
            yield lose(replace(world, blips=world.blips - 1), machine, replace(machine, away=True))
    if len(world.machines) < NODES + world.standby * (world.order is not None):
        fresh = replace(world, machines=(*world.machines, Machine(world.started)), started=world.started + 1)
        yield say(fresh, SpareJoined(spare(world.started), NOW))
    if world.takeovers:
        yield take_over(world)


def spare_moves(world: World, machine: Machine) -> Iterator[World]:
    if machine.wants is None:
        meant = [slot for slot, number in enumerate(world.assigned) if number == machine.number]
        for slot in meant[:1]:
            if world.holder(slot) is None:
                yield put(world, machine, replace(machine, wants=slot))
    elif world.holder(machine.wants) is not None:
        yield put(world, machine, replace(machine, wants=None))
    else:  # also when the root has changed its mind meanwhile
        joined = put(world, machine, replace(machine, slot=machine.wants, wants=None))
        who = member(machine.wants, machine.number)
        yield say(joined, MemberJoined(who, NOW), SpareLost(who.name, NOW))


def member_moves(world: World, machine: Machine) -> Iterator[World]:
    order, slot = world.order, machine.slot
    mine = order is not None and order.members[slot].incarnation == machine.incarnation
    if order is not None and mine and order.rank > machine.obeyed:
        if order.phase == REPORT:
            obeyed = replace(machine, obeyed=order.rank, workers="none")
            yield say(put(world, machine, obeyed), Reported(report(slot, order.generation, machine.number), NOW))
        else:
            yield put(world, machine, replace(machine, obeyed=order.rank, workers="running"))
    if machine.workers == "running":
        good = replace(machine, workers="good")
        yield say(put(world, machine, good), *list(answers_of(good))[1:])
        if world.crashes:
            bad = replace(machine, workers="bad")
            crashed = replace(world, crashes=world.crashes - 1)
            yield say(put(crashed, machine, bad), *list(answers_of(bad))[1:])


def lose(world: World, machine: Machine, left: Machine | None) -> World:
    """The lease of a machine ends, with the machine or without."""
    gone = put(world, machine, left)
    if machine.away:
        return gone
    if machine.slot is None:
        return say(gone, SpareLost(f"machine-{machine.number}", NOW))
    return say(gone, MemberLost(machine.slot, NOW))


def come_back(world: World, machine: Machine) -> World:
    back = replace(machine, away=False)
    if machine.slot is None:
        return say(put(world, machine, back), SpareJoined(spare(machine.number), NOW))
    if world.holder(machine.slot) is not None:
        return put(world, machine, None)  # another one has its slot: it fences itself off
    joined = MemberJoined(member(machine.slot, machine.number), NOW)
    return say(put(world, machine, back), joined, *answers_of(back))


def take_over(world: World) -> World:
    """A new root sees the store as it is."""
    old = replace(world, queue=(), takeovers=world.takeovers - 1)
    if world.result is not None:
        return old
    named = {each.machine for each in world.order.members} if world.order else set()
    found: list[Event] = [
        Assigned(slot, Assignment(f"machine-{number}", f"i{number}"), NOW)
        for slot, number in enumerate(world.assigned)
        if number is not None
    ]
    found += [MemberLost(slot, NOW) for slot in sorted(named) if world.holder(slot) is None]
    present = [machine for machine in world.machines if not machine.away]
    holders = [machine for machine in present if machine.slot is not None]
    found += [MemberJoined(member(each.slot, each.number), NOW) for each in holders]
    found += [answer for each in holders for answer in answers_of(each)]
    found += [SpareJoined(spare(each.number), NOW) for each in present if each.slot is None]
    return apply(old, *rebuild(SHAPE, world.order, found, NOW))


def explore(start: World) -> tuple[int, int]:
    """Visits every reachable world; returns how many there are, and how many of them are ends."""
    seen, frontier, ends = {start.key()}, [start], 0
    while frontier:
        world = frontier.pop()
        quiet = replace(world, kills=0, blips=0, crashes=0, takeovers=0)
        if next(moves(quiet), None) is None:
            assert world.result is True, f"the job is stuck: {world.root} {world.machines} {world.queue}"
            ends += 1
        for following in moves(world):
            key = following.key()
            if key not in seen:
                seen.add(key)
                frontier.append(following)
    return len(seen), ends
