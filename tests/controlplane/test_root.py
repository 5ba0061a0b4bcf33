"""Every order of events: a small world of real root decisions and simulated agents is explored exhaustively."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from lightning_gemini.controlplane.failure import classify
from lightning_gemini.controlplane.membership import Assignment
from lightning_gemini.controlplane.orders import (
    Outcome,
    RankExit,
    answer_to_json,
    order_from_json,
    order_to_json,
    outcome_from_json,
    report_from_json,
)
from lightning_gemini.controlplane.root import Phase, RootState, rebuild, step
from lightning_gemini.controlplane.root_events import (
    Announce,
    Assign,
    Assigned,
    Event,
    Evicted,
    Finish,
    GiveUp,
    JobEnded,
    MemberJoined,
    MemberLost,
    PutOrder,
    Reported,
    SpareJoined,
    SpareLost,
    Tick,
    WorkersEnded,
)
from lightning_gemini.core.recovery import Tier, VersionId
from tests.controlplane.root_world import NODES, SHAPE, Machine, World, explore, member, report, spare


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"kills": 1, "crashes": 1},
        {"kills": 1, "standby": 1, "takeovers": 1},
        {"blips": 1, "standby": 1},
        {"blips": 1, "takeovers": 1},
        {"takeovers": 2, "crashes": 1},
    ],
    ids=lambda limits: "-".join(f"{count}{name}" for name, count in limits.items()) or "calm",
)
def test_every_order_of_events_ends_with_the_job_done(limits: dict[str, int]) -> None:
    began = time.monotonic()
    joins: tuple[Event, ...] = tuple(SpareJoined(spare(number), 0.0) for number in range(NODES))
    start = World(RootState(SHAPE), tuple(Machine(number) for number in range(NODES)), joins, **limits)
    worlds, ends = explore(start)
    print(f"{worlds} worlds, {ends} ends, {time.monotonic() - began:.1f} s")
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
    return WorkersEnded(Outcome(slot, generation, f"i{slot}", exits=(RankExit(slot, 7, None, "SIGKILL", 3.0),)), 3.0)


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
    assert order.running == {0: "i0", 1: "i1"}
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
    state, actions = run(running(), WorkersEnded(Outcome(1, 1, "i1", fatal="rank 1 refuses: wrong layout"), 3.0))
    assert state.phase is Phase.DONE
    assert actions == [Finish(False, "rank 1 refuses: wrong layout")]
    assert step(state, killed(0, 1)) == (state, ())


def test_answers_of_older_generations_and_dead_incarnations_change_nothing() -> None:
    state = running()
    stale = WorkersEnded(Outcome(0, 0, "i0", finished=True), 3.0)
    stranger = WorkersEnded(Outcome(0, 1, "i9", finished=True), 3.0)
    assert run(state, stale, stranger, Reported(report(0, 1), 3.0), Tick(9.0)) == (state, [])


def test_members_whose_lease_the_store_dropped_are_awaited() -> None:
    before = running()
    found = [MemberLost(1, 10.0, grace_s=2.0), MemberJoined(member(0), 10.0)]
    state, actions = rebuild(SHAPE, before.order, found, 10.0)
    assert state.phase is Phase.RUNNING
    assert actions == ()
    back, actions = run(state, Tick(11.0), MemberJoined(member(1), 11.5), Tick(13.0))
    assert back.phase is Phase.RUNNING
    assert actions == []
    lost, actions = run(state, Tick(12.5))
    assert lost.phase is Phase.GATHERING
    assert actions == [GiveUp(1, "machine-1", "i1")]


def test_a_member_that_comes_back_was_never_away() -> None:
    before = running()
    state, actions = run(before, MemberLost(1, 9.0))
    assert (state.phase, actions) == (Phase.GATHERING, [GiveUp(1, "machine-1", "i1")])
    back, actions = run(state, MemberJoined(member(1), 9.5))
    assert (back.phase, back.order, back.lost_at, actions) == (Phase.RUNNING, before.order, None, [])
    # Not so when its peers could not go on without it meanwhile.
    failed, actions = run(state, killed(0, 1), MemberJoined(member(1), 9.5))
    assert failed.phase is Phase.REPORTING
    assert [action.order.generation for action in actions] == [2]


def test_a_standby_takes_a_vacant_slot_at_once_and_a_late_return_revokes_it() -> None:
    state, _ = run(running(), SpareJoined(spare(2), 8.0))
    state, actions = run(state, MemberLost(1, 9.0))
    assert actions[1:] == [Assign(1, Assignment("machine-2", "i2"))]
    taken, actions = run(state, MemberJoined(member(1, 2), 9.1), SpareLost("machine-2", 9.1))
    assert taken.phase is Phase.REPORTING
    assert [type(action) for action in actions] == [PutOrder]
    returned, actions = run(state, MemberJoined(member(1), 9.1))
    assert returned.phase is Phase.RUNNING
    assert actions == [Assign(1, None)]
    assert list(returned.spares) == ["machine-2"]


def test_an_assigned_spare_that_dies_is_replaced_by_another_or_by_nobody() -> None:
    state, _ = run(running(), SpareJoined(spare(2), 8.0), SpareJoined(spare(10), 8.0), MemberLost(1, 9.0))
    state, actions = run(state, SpareLost("machine-2", 9.1))
    assert actions == [Assign(1, Assignment("machine-10", "i10"))]
    state, actions = run(state, SpareLost("machine-10", 9.2))
    assert actions == [Assign(1, None)]
    state, actions = run(state, SpareJoined(spare(11), 9.3))
    assert actions == [Assign(1, Assignment("machine-11", "i11"))]


def test_first_slots_follow_domains_and_names_and_wait_until_there_are_enough() -> None:
    state = RootState(replace(SHAPE, nodes=3))
    state, actions = run(state, SpareJoined(spare(10), 1.0), SpareJoined(spare(9), 1.0))
    assert actions == []
    _, actions = run(state, SpareJoined(spare(0), 1.0))
    assert [action.assignment.name for action in actions] == ["machine-0", "machine-9", "machine-10"]
    _, actions = run(state, SpareJoined(spare(11, domain="a"), 1.0))
    assert [action.assignment.name for action in actions] == ["machine-9", "machine-10", "machine-11"]
    racks = [SpareJoined(spare(number, domain), 1.0) for number, domain in ((0, "b"), (1, "a"), (2, "b"))]
    _, actions = run(RootState(replace(SHAPE, nodes=3)), *racks)
    assert [action.assignment.name for action in actions] == ["machine-1", "machine-0", "machine-2"]


def test_a_replacement_comes_from_the_failure_domain_of_its_predecessor() -> None:
    state = RootState(SHAPE)
    joins = [MemberJoined(member(slot, domain=domain), 1.0) for slot, domain in enumerate("ab")]
    state, _ = run(state, *joins, *(Reported(report(slot, 1), 2.0) for slot in range(NODES)))
    state, _ = run(state, SpareJoined(spare(2, "a"), 3.0), SpareJoined(spare(3, "b"), 3.0))
    _, actions = run(state, MemberLost(1, 4.0))
    assert actions[-1] == Assign(1, Assignment("machine-3", "i3"))


def test_a_new_root_honours_what_its_predecessor_assigned() -> None:
    before = running()
    found = [MemberLost(1, 9.0), MemberJoined(member(0), 9.0), SpareJoined(spare(2), 9.0), SpareJoined(spare(3), 9.0)]
    state, actions = rebuild(SHAPE, before.order, [Assigned(1, Assignment("machine-3", "i3"), 9.0), *found], 9.0)
    assert [action for action in actions if isinstance(action, Assign)] == []
    assert state.assigned == {1: Assignment("machine-3", "i3")}
    _, actions = rebuild(SHAPE, before.order, [Assigned(1, Assignment("machine-9", "i9"), 9.0), *found], 9.0)
    assert actions[-1] == Assign(1, Assignment("machine-2", "i2"))


def test_members_that_live_but_answer_no_order_are_given_up() -> None:
    state, _ = run(running(), SpareJoined(spare(2), 3.0), killed(0, 1), Reported(report(0, 2), 4.0))
    state, actions = run(state, Tick(32.9))
    assert actions == []
    state, actions = run(state, Tick(33.1))
    assert actions == [GiveUp(1, "machine-1", "i1", evict=True), Assign(1, Assignment("machine-2", "i2"))]
    # It does not count any more, whatever it says, and the next root knows that from the store.
    state, actions = run(state, MemberJoined(member(1), 34.0), Reported(report(1, 2), 34.0), MemberLost(1, 35.0))
    assert (state.phase, actions) == (Phase.GATHERING, [])
    found = [Evicted(1, "i1", 36.0), MemberJoined(member(0), 36.0), MemberJoined(member(1), 36.0)]
    state, actions = rebuild(SHAPE, state.order, found, 36.0)
    assert (state.phase, list(state.members), actions) == (Phase.GATHERING, [0], ())


def test_a_job_that_somebody_ended_stays_ended() -> None:
    state, actions = run(running(), JobEnded(3.0), MemberLost(1, 3.1), MemberLost(0, 3.2))
    assert (state.phase, actions) == (Phase.DONE, [])


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
    state, _ = run(running(), killed(0, 1), MemberLost(1, 4.0), MemberJoined(member(1, 2), 5.0))
    generation = state.generation
    exits = (RankExit(0, 7, 1, None, 3.0),)
    answers = [Reported(report(0, generation, exits=exits), 6.0), Reported(report(1, generation, 2), 6.0)]
    state, actions = run(state, *answers)
    failure = next(action.failure for action in actions if isinstance(action, Announce))
    assert (failure.kind, failure.nodes_lost, failure.time) == ("hardware", (1,), 4.0)


def test_messages_survive_the_store() -> None:
    state = running(replicas=2, placement="mixed", progress={})
    assert state.order is not None
    assert order_from_json(order_to_json(state.order)) == state.order
    answer = report(0, 2, exits=(RankExit(0, 7, None, "SIGKILL", 3.0),))
    assert report_from_json(answer_to_json(answer)) == answer
    outcome = Outcome(0, 2, "i0", fatal="no")
    assert outcome_from_json(answer_to_json(outcome)) == outcome
