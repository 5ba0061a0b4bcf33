"""Every order of events: a small world of real root decisions and simulated agents is explored exhaustively."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lightning_gemini.controlplane.failure import classify
from lightning_gemini.controlplane.membership import Member
from lightning_gemini.controlplane.orders import (
    REPORT,
    START,
    Order,
    Outcome,
    RankExit,
    Report,
    answer_to_json,
    order_from_json,
    order_to_json,
    outcome_from_json,
    report_from_json,
)
from lightning_gemini.controlplane.root import Phase, RootState, rebuild, step
from lightning_gemini.controlplane.root_events import (
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
from lightning_gemini.core.recovery import Tier, VersionId

NODES = 2
SHAPE = JobShape(NODES, 1, max_failures_without_progress=100)


def member(slot: int, life: int = 0) -> Member:
    return Member(slot, "127.0.0.1", 7000 + slot, 100 + slot, f"{slot}.{life}")


def report(slot: int, generation: int, life: int = 0, exits: tuple[RankExit, ...] = (), **memory: Any) -> Report:
    return Report(slot, generation, f"{slot}.{life}", 9000, {"machine": slot, "holdings": [], **memory}, exits)


@dataclass(frozen=True)
class Agent:
    """What one simulated machine has done: its newest order, and whether its workers run, ended well or badly."""

    life: int
    obeyed: tuple[int, bool] = (0, False)
    workers: str = "none"


@dataclass(frozen=True)
class World:
    """The store's content is `order` and the answers; `queues` hold what the root was not told yet, by slot."""

    root: RootState
    agents: tuple[Agent | None, ...]
    queues: tuple[tuple[Event, ...], ...]
    failures_left: int
    takeovers_left: int
    lives: tuple[int, ...] = (0,) * NODES
    result: bool | None = None

    @property
    def order(self) -> Order | None:
        return self.root.order

    def key(self) -> Any:
        root = self.root
        seen = (root.phase, order_to_json(root.order) if root.order else "", tuple(sorted(root.members)))
        answers = (tuple(sorted(root.reports)), tuple(sorted(root.finished)), tuple(sorted(root.awaited)))
        rest = (self.agents, repr(self.queues), self.failures_left, self.takeovers_left, self.result)
        return seen, tuple(m.incarnation for m in root.members.values()), answers, rest


def put(values: tuple[Any, ...], slot: int, value: Any) -> tuple[Any, ...]:
    return (*values[:slot], value, *values[slot + 1 :])


def say(world: World, slot: int, event: Event) -> World:
    return replace(world, queues=put(world.queues, slot, (*world.queues[slot], event)))


def apply(world: World, state: RootState, actions: tuple[Any, ...]) -> World:
    newest = world.root.order.rank if world.root.order else (0, False)
    for action in actions:
        match action:
            case PutOrder(order):
                assert order.rank > newest, "orders only ever get newer"
                newest = order.rank
                if order.phase == START:
                    check_nobody_runs(world, order)
            case Finish(success, _):
                world = replace(world, result=success)
    return replace(world, root=state)


def check_nobody_runs(world: World, order: Order) -> None:
    """No worker of an older generation may run when the next starts: its replicas would mix with the new ones."""
    for slot, agent in enumerate(world.agents):
        if agent is not None and f"{slot}.{agent.life}" == order.members[slot].incarnation:
            assert agent.obeyed == (order.generation, False)
            assert agent.workers == "none"


def agent_moves(world: World, slot: int, agent: Agent) -> Iterator[World]:
    order = world.order
    mine = order is not None and any(m.incarnation == f"{slot}.{agent.life}" for m in order.members)
    if order is not None and mine and order.rank > agent.obeyed:
        if order.phase == REPORT:
            obeyed = replace(agent, obeyed=order.rank, workers="none")
            answer: Event = Reported(report(slot, order.generation, agent.life), 0.0)
            yield say(replace(world, agents=put(world.agents, slot, obeyed)), slot, answer)
        else:
            running = replace(agent, obeyed=order.rank, workers="running")
            yield replace(world, agents=put(world.agents, slot, running))
    if agent.workers == "running":
        outcome = Outcome(slot, agent.obeyed[0], f"{slot}.{agent.life}", finished=True)
        done = replace(world, agents=put(world.agents, slot, replace(agent, workers="good")))
        yield say(done, slot, WorkersEnded(outcome, 0.0))
        if world.failures_left:
            exits = (RankExit(slot, 1, None, "SIGKILL", 0.0),)
            failed = replace(done, failures_left=world.failures_left - 1)
            failed = replace(failed, agents=put(world.agents, slot, replace(agent, workers="bad")))
            yield say(failed, slot, WorkersEnded(replace(outcome, finished=False, exits=exits), 0.0))
    if world.failures_left:
        killed = replace(world, agents=put(world.agents, slot, None), failures_left=world.failures_left - 1)
        yield say(killed, slot, MemberLost(slot, 0.0))


def moves(world: World) -> Iterator[World]:
    for slot in range(NODES):
        if world.queues[slot]:
            event, *rest = world.queues[slot]
            rested = replace(world, queues=put(world.queues, slot, tuple(rest)))
            yield apply(rested, *step(world.root, event))
        agent = world.agents[slot]
        if agent is not None:
            yield from agent_moves(world, slot, agent)
        else:  # its lease is over: the launcher starts another one
            life = world.lives[slot] + 1
            reborn = replace(world, agents=put(world.agents, slot, Agent(life)), lives=put(world.lives, slot, life))
            yield say(reborn, slot, MemberJoined(member(slot, life), 0.0))
    if world.takeovers_left:
        yield take_over(world)


def take_over(world: World) -> World:
    """A new root sees the store as it is: what the agents wrote, and no member whose agent is dead."""
    now = 5.0
    found: list[Event] = []
    for slot, agent in enumerate(world.agents):
        named = world.order is not None
        if agent is None:
            found += [MemberLost(slot, now)] if named else []
        else:
            found.append(MemberJoined(member(slot, agent.life), now))
    for slot, agent in enumerate(world.agents):
        if agent is not None and agent.workers in ("good", "bad"):
            exits = (RankExit(slot, 1, None, "SIGKILL", 0.0),) if agent.workers == "bad" else ()
            outcome = Outcome(slot, agent.obeyed[0], f"{slot}.{agent.life}", agent.workers == "good", exits)
            found.append(WorkersEnded(outcome, now))
        if agent is not None and agent.obeyed[0] and not agent.obeyed[1]:
            found.append(Reported(report(slot, agent.obeyed[0], agent.life), now))
    old = replace(world, queues=((),) * NODES, takeovers_left=world.takeovers_left - 1)
    if world.result is not None:
        return old
    return apply(old, *rebuild(SHAPE, world.order, found, {}))


def explore(start: World) -> tuple[int, int]:
    """Visits every reachable world; returns how many there are, and how many of them are ends."""
    seen, frontier, ends = {start.key()}, [start], 0
    while frontier:
        world = frontier.pop()
        quiet = replace(world, failures_left=0, takeovers_left=0)
        if not any(True for _ in moves(quiet)):
            assert world.result is True, f"the job is stuck: {world.root.phase} {world.agents} {world.queues}"
            ends += 1
        for following in moves(world):
            key = following.key()
            if key not in seen:
                seen.add(key)
                frontier.append(following)
    return len(seen), ends


@pytest.mark.parametrize(("failures", "takeovers"), [(0, 0), (2, 0), (1, 1), (2, 1)])
def test_every_order_of_events_ends_with_the_job_done(failures: int, takeovers: int) -> None:
    queues = tuple((MemberJoined(member(slot), 0.0),) for slot in range(NODES))
    start = World(RootState(SHAPE), tuple(Agent(0) for _ in range(NODES)), queues, failures, takeovers)
    worlds, ends = explore(start)
    print(f"{worlds} worlds, {ends} ends")
    assert ends


def run(state: RootState, *events: Event) -> tuple[RootState, list[Any]]:
    actions: list[Any] = []
    for event in events:
        state, more = step(state, event)
        actions += more
    return state, actions


def running(failures_allowed: int = 3, **memory: Any) -> RootState:
    state = RootState(replace(SHAPE, max_failures_without_progress=failures_allowed))
    joins = [MemberJoined(member(slot), 1.0) for slot in range(NODES)]
    reports = [Reported(report(slot, 1, **memory), 2.0) for slot in range(NODES)]
    state, _ = run(state, *joins, *reports)
    assert state.phase is Phase.RUNNING
    return state


def killed(slot: int, generation: int) -> WorkersEnded:
    return WorkersEnded(Outcome(slot, generation, f"{slot}.0", exits=(RankExit(slot, 7, None, "SIGKILL", 3.0),)), 3.0)


def test_a_start_order_carries_the_plan_made_from_the_reports() -> None:
    shards = [{"owner": 0, "id": {"generation": 1, "version": 5}, "retrieved": False}]
    shards += [{"owner": 1, "id": {"generation": 1, "version": 5}, "retrieved": False}]
    known = {"replicas": 2, "placement": "mixed", "progress": {"0": 5}}
    state = running()
    state, _ = run(state, killed(0, 1), Reported(report(0, 2, **known, holdings=shards), 4.0))
    state, actions = run(state, Reported(report(1, 2), 4.0))
    order = next(action.order for action in actions if isinstance(action, PutOrder))
    assert order.plan.id == VersionId(1, 5)
    assert order.plan.tiers == (Tier.LOCAL_MEMORY, Tier.REMOTE_MEMORY)
    assert [(fetch.owner, fetch.source, fetch.target) for fetch in order.plan.fetches] == [(1, 0, 1)]
    assert order.master_port == 9000
    assert order.running == {0: "0.0", 1: "1.0"}
    assert order.failures == 0


def test_failures_without_a_new_step_are_counted_and_end_the_job() -> None:
    state = running(failures_allowed=2)
    for generation, steps in ((2, 4), (3, 4), (4, 5), (5, 5), (6, 5), (7, 5)):
        state, _ = run(state, killed(0, generation - 1))
        answers = [Reported(report(slot, generation, progress={str(slot): steps}), 5.0) for slot in range(NODES)]
        state, actions = run(state, *answers)
        if state.phase is Phase.DONE:
            break
    assert generation == 7
    assert isinstance(actions[-1], Finish)
    assert not actions[-1].success
    assert "3 failures in a row without a new completed step (newest: 5)" in actions[-1].reason


def test_a_fatal_report_ends_the_job_at_once() -> None:
    state, actions = run(running(), WorkersEnded(Outcome(1, 1, "1.0", fatal="rank 1 refuses: wrong layout"), 3.0))
    assert state.phase is Phase.DONE
    assert actions == [Finish(False, "rank 1 refuses: wrong layout")]
    assert step(state, killed(0, 1)) == (state, ())


def test_answers_of_older_generations_and_dead_incarnations_change_nothing() -> None:
    state = running()
    stale = WorkersEnded(Outcome(0, 0, "0.0", finished=True), 3.0)
    stranger = WorkersEnded(Outcome(0, 1, "0.9", finished=True), 3.0)
    assert run(state, stale, stranger, Reported(report(0, 1), 3.0), Tick(9.0)) == (state, [])


def test_a_new_root_waits_for_members_whose_lease_the_store_dropped() -> None:
    before = running()
    state, actions = rebuild(SHAPE, before.order, [MemberJoined(member(0), 10.0)], {1: 12.0})
    assert state.phase is Phase.RUNNING
    assert actions == ()
    back, actions = run(state, Tick(11.0), MemberJoined(member(1), 11.5), Tick(13.0))
    assert back.phase is Phase.RUNNING
    assert actions == []
    lost, actions = run(state, Tick(12.5))
    assert lost.phase is Phase.GATHERING
    assert actions == [RequestReplacement(1, "1.0")]


def test_memory_of_another_shape_ends_the_job_with_the_reason() -> None:
    state, _ = run(running(), killed(0, 1))
    state, actions = run(state, Reported(report(0, 2, error="memory of 3 machines"), 4.0), Reported(report(1, 2), 4.0))
    assert actions[-1].reason == "memory of 3 machines"
    assert not actions[-1].success


def test_the_killed_rank_is_the_cause_and_not_its_peers_that_exited() -> None:
    order = replace(running().order, generation=2)  # type: ignore[type-var]
    exits = (RankExit(0, 50, 1, None, 3.0), RankExit(1, 51, None, "SIGABRT", 3.1))
    dead = (RankExit(2, 60, None, "SIGKILL", 3.2),)
    failure = classify(order, {0: report(0, 2, exits=exits), 1: report(1, 2, exits=dead)}, 9.0)
    assert (failure.kind, failure.node, failure.time, failure.generation) == ("software", 1, 3.0, 1)
    assert failure.detail == "rank 2 (pid 60) was killed by SIGKILL"


def test_lost_machines_come_before_everything() -> None:
    state, _ = run(running(), killed(0, 1), MemberLost(1, 4.0), MemberJoined(member(1, life=1), 5.0))
    generation = state.generation
    exits = (RankExit(0, 7, 1, None, 3.0),)
    answers = [Reported(report(0, generation, exits=exits), 6.0), Reported(report(1, generation, life=1), 6.0)]
    state, actions = run(state, *answers)
    failure = next(action.failure for action in actions if isinstance(action, Announce))
    assert (failure.kind, failure.nodes_lost, failure.time) == ("hardware", (1,), 4.0)


def test_messages_survive_the_store() -> None:
    state = running(replicas=2, placement="mixed", progress={})
    assert state.order is not None
    assert order_from_json(order_to_json(state.order)) == state.order
    answer = report(0, 2, exits=(RankExit(0, 7, None, "SIGKILL", 3.0),))
    assert report_from_json(answer_to_json(answer)) == answer
    outcome = Outcome(0, 2, "0.0", fatal="no")
    assert outcome_from_json(answer_to_json(outcome)) == outcome
