from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.core.placement import STRATEGIES, Placement, plan_placement
from lightning_gemini.core.recovery import (
    Fetch,
    Holding,
    Inventory,
    RecoveryPlan,
    Tier,
    VersionId,
    fetch_from_json,
    fetch_to_json,
    inventory_from_json,
    inventory_to_json,
    plan_from_json,
    plan_recovery,
    plan_to_json,
    version_from_json,
    version_to_json,
)
from lightning_gemini.errors import LayoutMismatchError, ProtocolError

OLD, COMMITTED, TORN = VersionId(1, 9), VersionId(1, 10), VersionId(1, 11)


def subsets(items: range) -> Iterator[set[int]]:
    return (set(chosen) for chosen in chain.from_iterable(combinations(items, size) for size in range(len(items) + 1)))


def clusters(max_machines: int) -> Iterator[tuple[Placement, int]]:
    """Yields every placement of up to ``max_machines`` machines, with the number of machines."""
    for machines, strategy in product(range(1, max_machines + 1), STRATEGIES):
        for replicas in range(1, machines + 1):
            if strategy != "group" or machines % replicas == 0:
                yield plan_placement(machines, replicas, strategy, [str(m % 3) for m in range(machines)]), machines


def hosted_ranks(placement: Placement, machine: int, nproc: int) -> list[int]:
    return [owner * nproc + local for owner in placement.hosted_by(machine) for local in range(nproc)]


def full_inventories(placement: Placement, nproc: int, *versions: VersionId) -> list[Inventory]:
    return [
        Inventory(
            machine,
            tuple(Holding(o, v, False) for o in hosted_ranks(placement, machine, nproc) for v in versions),
        )
        for machine in range(len(placement.holder_sets))
    ]


def assert_right(placement: Placement, nproc: int, inventories: list[Inventory], plan: RecoveryPlan) -> None:
    """Checks ``plan`` against a plain reading of what the machines hold."""
    world = len(placement.holder_sets) * nproc
    held = {(i.machine, h.owner, h.id): h.retrieved for i in inventories for h in i.holdings}
    versions = {version for _, _, version in held}
    somewhere = {version: {o for _, o, v in held if v == version} for version in versions}
    complete = [version for version in versions if somewhere[version] == set(range(world))]

    assert plan.id == max(complete, default=None), "the newest complete version wins"
    newest = max(versions, default=None)
    assert plan.missing == (() if newest is None else tuple(sorted(set(range(world)) - somewhere[newest])))
    if plan.id is None:
        assert plan.tiers == (Tier.NONE,) * world
        assert plan.fetches == plan.refills == ()
        return

    moves = [*plan.fetches, *plan.refills]
    assert {move.id for move in moves} <= {plan.id}, "versions never mix"
    assert all((move.source, move.owner, plan.id) in held for move in moves), "sources hold what is fetched"
    assert all((move.target, move.owner, plan.id) not in held for move in moves), "nothing is sent twice"
    assert len({(move.owner, move.target) for move in moves}) == len(moves), "nothing is planned twice"
    assert all(move.target == move.owner // nproc for move in plan.fetches), "owners fetch, others are refilled"
    assert all(move.target != move.owner // nproc for move in plan.refills)

    after_fetches = {(m, o) for m, o, v in held if v == plan.id} | {(f.target, f.owner) for f in plan.fetches}
    assert all((owner // nproc, owner) in after_fetches for owner in range(world)), "every owner can restore"
    after = after_fetches | {(refill.target, refill.owner) for refill in plan.refills}
    wanted = {(holder, owner) for owner in range(world) for holder in placement.holders(owner // nproc)}
    assert wanted <= after, "fully replicated again"
    assert {(move.target, move.owner) for move in moves} <= wanted, "nothing goes where nobody needs it"

    for owner in range(world):
        retrieved = held.get((owner // nproc, owner, plan.id), True)
        assert plan.tiers[owner] == (Tier.REMOTE_MEMORY if retrieved else Tier.LOCAL_MEMORY)


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("silent", [False, True], ids=["replaced", "silent"])
def test_every_set_of_lost_machines(nproc: int, silent: bool) -> None:
    for placement, machines in clusters(max_machines=6):
        whole = full_inventories(placement, nproc, OLD, COMMITTED)
        for lost in subsets(range(machines)):
            inventories = [i for i in whole if i.machine not in lost]
            if not silent:
                inventories += [Inventory(machine, ()) for machine in sorted(lost)]
            plan = plan_recovery(placement, nproc, inventories)
            assert_right(placement, nproc, inventories, plan)
            assert (plan.id == COMMITTED) == placement.recoverable(lost)
            if plan.id is None:
                # The message names exactly the ranks of which all holders are lost.
                gone = {m for m in range(machines) if set(placement.holders(m)) <= lost}
                expected = {rank for m in gone for rank in range(m * nproc, (m + 1) * nproc)}
                assert set(plan.missing) == (expected if len(lost) < machines else set())
            else:
                lost_ranks = {rank for m in lost for rank in range(m * nproc, (m + 1) * nproc)}
                assert {f.owner for f in plan.fetches} == lost_ranks
                assert {f.target for f in plan.refills} <= lost


@pytest.mark.parametrize(("machines", "replicas"), [(2, 2), (3, 2), (4, 2), (3, 3)])
def test_every_half_written_version_and_every_set_of_lost_machines(machines: int, replicas: int) -> None:
    """Any subset of replicas already overwrote OLD with TORN when any subset of machines was lost."""
    placement = plan_placement(machines, replicas)
    replica_list = [(m, owner) for m in range(machines) for owner in placement.hosted_by(m)]
    for written in product([False, True], repeat=len(replica_list)):
        held: dict[int, list[Holding]] = {machine: [] for machine in range(machines)}
        for (machine, owner), is_new in zip(replica_list, written, strict=True):
            held[machine] += [Holding(owner, COMMITTED, False), Holding(owner, TORN if is_new else OLD, False)]
        for lost in subsets(range(machines)):
            inventories = [Inventory(m, () if m in lost else tuple(h)) for m, h in held.items()]
            plan = plan_recovery(placement, 1, inventories)
            assert_right(placement, 1, inventories, plan)
            if placement.recoverable(lost):
                assert plan.id in (COMMITTED, TORN), "a committed version is never lost"


versions = st.builds(VersionId, st.integers(1, 2), st.integers(1, 3))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Placement, int, list[Inventory]]:
    machines, nproc = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    placement = plan_placement(machines, draw(st.integers(1, machines)), draw(st.sampled_from(["mixed", "ring"])))
    # Anybody may hold anything: placements change between runs.
    holdings = st.builds(Holding, st.integers(0, machines * nproc - 1), versions, st.booleans())
    keep = st.lists(holdings, max_size=12, unique_by=lambda holding: (holding.owner, holding.id)).map(tuple)
    reported = draw(st.permutations([Inventory(machine, draw(keep)) for machine in range(machines)]))
    return placement, nproc, reported[: draw(st.integers(0, machines))]


@given(situations(), st.randoms(use_true_random=False))
def test_any_situation(situation: tuple[Placement, int, list[Inventory]], random: object) -> None:
    placement, nproc, inventories = situation
    plan = plan_recovery(placement, nproc, inventories)
    assert_right(placement, nproc, inventories, plan)
    shuffled = [Inventory(i.machine, tuple(reversed(i.holdings))) for i in inventories]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_recovery(placement, nproc, shuffled) == plan, "all callers compute the same plan"
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    assert plan_from_json(asdict(plan)) == plan
    assert json.loads(json.dumps(asdict(plan))) == json.loads(json.dumps(plan_to_json(plan)))
    for inventory in inventories:
        assert inventory_from_json(json.loads(json.dumps(inventory_to_json(inventory)))) == inventory


def test_nothing_held_names_nobody_missing() -> None:
    plan = plan_recovery(plan_placement(2, 2), 1, [Inventory(0, ()), Inventory(1, ())])
    assert plan == RecoveryPlan(None, (Tier.NONE, Tier.NONE))


def test_newer_generation_beats_larger_step() -> None:
    placement = plan_placement(2, 2)
    inventories = full_inventories(placement, 1, VersionId(1, 50), VersionId(2, 40))
    assert plan_recovery(placement, 1, inventories).id == VersionId(2, 40)


def test_replica_retrieved_in_this_recovery_counts_as_remote() -> None:
    placement = plan_placement(2, 2)
    inventories = [
        Inventory(0, (Holding(0, COMMITTED, False), Holding(1, COMMITTED, False))),
        Inventory(1, (Holding(1, COMMITTED, True),)),
    ]
    plan = plan_recovery(placement, 1, inventories)
    assert plan.tiers == (Tier.LOCAL_MEMORY, Tier.REMOTE_MEMORY)
    assert plan.fetches == ()
    assert plan.refills == (Fetch(owner=0, source=0, target=1, id=COMMITTED),)


def test_several_inventories_of_one_machine_are_united() -> None:
    placement = plan_placement(1, 1)
    inventories = [Inventory(0, (Holding(rank, COMMITTED, False),)) for rank in range(2)]
    assert plan_recovery(placement, 2, inventories).tiers == (Tier.LOCAL_MEMORY,) * 2


def test_holders_share_the_sending() -> None:
    placement = plan_placement(4, 4)
    inventories = full_inventories(placement, 3, COMMITTED)[1:]
    plan = plan_recovery(placement, 3, inventories)
    assert Counter(fetch.source for fetch in plan.fetches) == {1: 1, 2: 1, 3: 1}
    assert Counter(fetch.source for fetch in (*plan.fetches, *plan.refills)) == {1: 4, 2: 4, 3: 4}


@pytest.mark.parametrize("owner", [-1, 4])
def test_memory_of_another_world_size_is_refused(owner: int) -> None:
    with pytest.raises(LayoutMismatchError, match=r"this job has 4 ranks \(2 machines × 2\): start it with"):
        plan_recovery(plan_placement(2, 2), 2, [Inventory(0, (Holding(owner, COMMITTED, False),))])


def test_machine_outside_the_job_is_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="this job has 2 machines: start it with"):
        plan_recovery(plan_placement(2, 2), 2, [Inventory(2, ())])


def test_tiers_are_plain_strings() -> None:
    assert [f"{tier}" for tier in Tier] == ["local_memory", "remote_memory", "persistent", "none"]
    assert json.dumps(list(Tier)) == '["local_memory", "remote_memory", "persistent", "none"]'


def test_json_of_the_parts() -> None:
    fetch = Fetch(1, 2, 3, COMMITTED)
    assert fetch_from_json(json.loads(json.dumps(fetch_to_json(fetch)))) == fetch
    assert version_from_json(version_to_json(COMMITTED)) == COMMITTED
    assert fetch_to_json(fetch) == asdict(fetch)


@pytest.mark.parametrize(
    "change",
    [
        {"id": 3},
        {"id": {"generation": 1}},
        {"id": {"generation": 1, "version": True}},
        {"tiers": ["lunar_memory"]},
        {"tiers": [["none"]]},
        {"tiers": None},
        {"fetches": [{"owner": 0}]},
        {"refills": ["x"]},
        {"missing": ["0"]},
    ],
)
def test_what_is_no_plan_is_refused(change: dict[str, object]) -> None:
    plan = plan_to_json(plan_recovery(plan_placement(1, 1), 1, []))
    with pytest.raises(ProtocolError):
        plan_from_json({**plan, **change})
    with pytest.raises(ProtocolError):
        inventory_from_json({"machine": 0, "holdings": [{"owner": 0, "id": {"generation": 1, "version": 1}}]})
