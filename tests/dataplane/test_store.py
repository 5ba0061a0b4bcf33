"""The store: which buffer a replica may have, what a recovery forgets, and whose job the memory is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_gemini.core.recovery import Holding, VersionId
from lightning_gemini.dataplane import capacity
from lightning_gemini.dataplane.slab import Buffer, BufferState, Slab
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.errors import CapacityError, LayoutMismatchError, PlacementError, ProtocolError
from tests.dataplane.machines import complete_ids, write_version

MINE, THEIRS = 0, 1  # ranks of machines 0 and 1, with one rank each


def version(number: int, generation: int = 1) -> VersionId:
    return VersionId(generation, number)


@pytest.fixture
def store() -> Iterator[ShardStore]:
    made = ShardStore(0)
    made.enter_generation(1, 2, 1)
    made.set_replication(2, "mixed")
    yield made
    made.clear()


def take_in(store: ShardStore, number: int, *, kept: VersionId | None = None, generation: int = 1) -> Buffer | None:
    """Receive a replica of the peer's version, as the server does."""
    buffer = store.replica_target(THEIRS, version(number, generation), 1000, store.generation, kept)
    if buffer is not None:
        buffer.data[:1000] = bytes([number % 256]) * 1000
        buffer.seal(1000)
        buffer.complete()
    return buffer


# -- memory ------------------------------------------------------------------------------------------------------------


class SlowMaker:
    """Makes slabs when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go_on, self.made = threading.Event(), threading.Event(), 0
        create = Slab.create

        def slow_create(owner: int, data_bytes: int) -> Slab:
            self.began.set()
            assert self.go_on.wait(20)
            self.made += 1
            return create(owner, data_bytes)

        monkeypatch.setattr(Slab, "create", slow_create)


MAKERS: dict[str, Callable[[ShardStore], object]] = {
    "own": lambda store: store.own(MINE, 1000),
    "replica": lambda store: store.replica_target(THEIRS, version(1), 1000, 1),
    "retrieval": lambda store: store.retrieval_target(THEIRS, version(1), 1000),
}


@pytest.mark.parametrize("name", MAKERS)
def test_nobody_waits_for_the_memory_of_another(store: ShardStore, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes take seconds, in which the root may ask what is here, and training goes on."""
    if name == "own":
        take_in(store, 7)
    else:
        store.own(MINE, 1000)
    maker = SlowMaker(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(MAKERS[name], store) for _ in range(2)]
        try:
            assert maker.began.wait(20)
            assert len(store.slabs()) == 1
            if name == "own":
                assert take_in(store, 8) is not None
                assert [holding.id for holding in store.inventory().holdings] == [version(7), version(8)]
            else:
                assert store.own(MINE, 1000) is store.slab(MINE)
        finally:
            maker.go_on.set()
        for one in made:
            one.result(20)
    assert maker.made == 1, "both asked for the same one"
    assert len(store.slabs()) == 2


@pytest.mark.parametrize(
    ("change", "left"), [(lambda store: store.clear(), 0), (lambda store: store.enter_generation(2, 3, 1), 0)]
)
@pytest.mark.parametrize("name", MAKERS)
def test_memory_that_nobody_wants_any_more_is_freed(
    store: ShardStore, name: str, change: Callable[[ShardStore], None], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = SlowMaker(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(MAKERS[name], store)
        try:
            assert maker.began.wait(20)
            change(store)
        finally:
            maker.go_on.set()
        with pytest.raises(ProtocolError, match="wants no memory for rank"):
            made.result(20)
    assert len(store.slabs()) == left


def test_a_retrieval_whose_generation_ended_meanwhile_gets_no_buffer(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = SlowMaker(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(MAKERS["retrieval"], store)
        try:
            assert maker.began.wait(20)
            store.enter_generation(2, 2, 1)
        finally:
            maker.go_on.set()
        with pytest.raises(ProtocolError, match="is in generation 2, the retrieval in 1"):
            made.result(20)


# -- replicas ----------------------------------------------------------------------------------------------------------


def test_a_replica_never_takes_the_buffer_of_the_newest_complete_version(store: ShardStore) -> None:
    for number in range(1, 12):
        newest = complete_ids(store.slab(THEIRS))[:1]
        target = store.replica_target(THEIRS, version(number), 1000, 1)
        assert target is not None
        assert (target.id, target.state) == (version(number), BufferState.WRITING)
        assert complete_ids(store.slab(THEIRS))[:1] == newest
        if number % 3:  # every third is torn
            target.seal(1000)
            target.complete()
        assert len(store.slabs()) == 1


def test_a_replica_that_is_here_is_not_taken_in_again(store: ShardStore) -> None:
    take_in(store, 5)
    assert take_in(store, 5) is None
    take_in(store, 6)
    assert take_in(store, 5) is None
    assert complete_ids(store.slab(THEIRS)) == [version(6), version(5)]


def test_a_version_that_was_given_up_makes_room_before_the_common_one(store: ShardStore) -> None:
    """All ranks keep 5 and gave 6 up, which is complete here: 7 must take the place of 6 and not that of 5."""
    take_in(store, 5)
    take_in(store, 6, kept=version(5))
    target = store.replica_target(THEIRS, version(7), 1000, 1, version(5))
    assert target is not None
    assert complete_ids(store.slab(THEIRS)) == [version(5)]
    target.seal(1000)
    target.complete()
    assert complete_ids(store.slab(THEIRS)) == [version(7), version(5)]


def test_an_older_generation_left_uncommitted_makes_room_too(store: ShardStore) -> None:
    take_in(store, 5)
    take_in(store, 6)
    store.enter_generation(2, 2, 1)
    assert take_in(store, 6, kept=version(5), generation=2) is not None
    assert complete_ids(store.slab(THEIRS)) == [version(6, 2), version(5)]


@pytest.mark.parametrize("sender", [0, 1, 3])
def test_another_generation_is_refused(store: ShardStore, sender: int) -> None:
    store.enter_generation(2, 2, 1)
    with pytest.raises(ProtocolError, match=f"is in generation 2, the sender in {sender}"):
        store.replica_target(THEIRS, version(9, 2), 1000, sender)
    assert not store.slabs()


@pytest.mark.parametrize("owner", [2, 99, 2**32 - 1])
def test_a_rank_that_is_not_hosted_here_is_refused(store: ShardStore, owner: int) -> None:
    with pytest.raises(ProtocolError, match="does not hold replicas"):
        store.replica_target(owner, version(1), 1000, 1)
    assert not store.slabs()


def test_with_one_replica_nothing_is_taken_in(store: ShardStore) -> None:
    store.set_replication(1, "mixed")
    with pytest.raises(ProtocolError, match="does not hold replicas of rank 1"):
        store.replica_target(THEIRS, version(1), 1000, 1)


def test_before_a_worker_has_said_how_many_replicas_nothing_is_taken_in() -> None:
    fresh = ShardStore(0)
    fresh.enter_generation(1, 2, 1)
    with pytest.raises(ProtocolError, match="no worker has said yet"):
        fresh.replica_target(THEIRS, version(1), 1000, 1)


def test_a_replica_for_which_memory_is_short_is_refused(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    take_in(store, 1)
    monkeypatch.setattr(capacity, "available_bytes", lambda: 260 * 2**20)
    with pytest.raises(CapacityError, match="cannot allocate"):
        store.replica_target(THEIRS, version(2), 50 * 2**20, 1)
    assert complete_ids(store.slab(THEIRS)) == [version(1)]


def test_what_a_recovery_went_back_behind_is_not_taken_in_again(store: ShardStore) -> None:
    """Its owner may not have heard of that yet. It would be kept in place of the common version, or be loaded later."""
    take_in(store, 5)
    store.enter_generation(2, 2, 1)
    store.resume_from(version(5))
    with pytest.raises(ProtocolError, match="wants no version 6 of rank 1: a recovery went back behind it"):
        take_in(store, 6)
    assert take_in(store, 5) is None
    assert take_in(store, 6, generation=2) is not None
    store.enter_generation(3, 2, 1)
    assert take_in(store, 7, generation=2) is not None  # nobody has resumed yet


def test_after_a_fresh_start_nothing_older_is_taken_in(store: ShardStore) -> None:
    store.enter_generation(2, 2, 1)
    store.resume_from(None)
    with pytest.raises(ProtocolError, match="wants no version 1"):
        take_in(store, 1)
    assert take_in(store, 1, generation=2) is not None


def test_a_version_older_than_all_that_is_held_is_refused(store: ShardStore) -> None:
    take_in(store, 5)
    take_in(store, 6)
    with pytest.raises(ProtocolError, match="holds newer versions of rank 1 than 4"):
        take_in(store, 4)
    assert complete_ids(store.slab(THEIRS)) == [version(6), version(5)]


def test_what_a_rank_of_this_machine_knows_helps_an_owner_that_knows_nothing(store: ShardStore) -> None:
    store.own(MINE, 1000).note_committed(version(5))
    take_in(store, 5)
    take_in(store, 6)
    target = store.replica_target(THEIRS, version(7), 1000, 1, None)
    assert target is not None
    assert complete_ids(store.slab(THEIRS)) == [version(5)]


def test_a_copy_that_is_damaged_is_dropped_when_it_is_read_again(store: ShardStore) -> None:
    buffer = take_in(store, 5)
    assert buffer is not None
    assert store.recheck(THEIRS, version(5))
    buffer.data[7] ^= 1
    assert not store.recheck(THEIRS, version(5))
    assert not complete_ids(store.slab(THEIRS))
    assert not store.recheck(THEIRS, version(5))


# -- retrieval ---------------------------------------------------------------------------------------------------------


def test_a_retrieved_shard_spares_the_newest_complete_one(store: ShardStore) -> None:
    slab = store.own(MINE, 1000)
    write_version(slab.buffers[0], version(4), 1000)
    write_version(slab.buffers[1], version(3), 1000)
    target = store.retrieval_target(MINE, version(5), 1000)
    assert target is slab.buffers[1]


def test_a_peers_replica_is_fetched_only_into_free_room(store: ShardStore) -> None:
    """A holder cannot say which of two complete versions was committed; the owner sends it, and can."""
    assert store.may_retrieve(THEIRS, version(6))
    take_in(store, 4)
    assert store.may_retrieve(THEIRS, version(6))
    take_in(store, 5)
    assert not store.may_retrieve(THEIRS, version(6))
    assert not store.may_retrieve(THEIRS, version(5))
    with pytest.raises(ProtocolError, match="no buffer of rank 1 may be overwritten yet"):
        store.retrieval_target(THEIRS, version(6), 1000)
    assert store.may_retrieve(THEIRS, version(3))  # what is newer is worthless when everybody loads 3


def test_a_retrieval_that_broke_off_is_repeated_in_the_same_buffer(store: ShardStore) -> None:
    target = store.retrieval_target(MINE, version(5), 1000)
    target.begin(version(5), 1000, retrieved=True)
    assert store.retrieval_target(MINE, version(5), 1000) is target


def test_what_was_retrieved_is_marked_until_training_resumes(store: ShardStore) -> None:
    target = store.retrieval_target(MINE, version(5), 1000)
    target.begin(version(5), 1000, retrieved=True)
    target.seal(1000)
    target.complete()
    assert store.inventory().holdings == (Holding(MINE, version(5), True),)
    store.resume_from(version(5))
    assert store.inventory().holdings == (Holding(MINE, version(5), False),)


# -- recovery ----------------------------------------------------------------------------------------------------------


def fill(store: ShardStore) -> None:
    """Own versions 4 and 5, the peer's 4 and a half of 5."""
    slab = store.own(MINE, 1000)
    write_version(slab.buffers[0], version(4), 1000)
    write_version(slab.buffers[1], version(5), 1000)
    take_in(store, 4)
    store.replica_target(THEIRS, version(5), 1000, 1)


def held(store: ShardStore) -> set[tuple[int, int]]:
    return {(holding.owner, holding.id.version) for holding in store.inventory().holdings}


def test_the_inventory_has_complete_versions_only(store: ShardStore) -> None:
    fill(store)
    assert store.inventory().machine == 0
    assert held(store) == {(MINE, 4), (MINE, 5), (THEIRS, 4)}


def test_resuming_forgets_what_is_newer_complete_or_not(store: ShardStore) -> None:
    fill(store)
    store.resume_from(version(4))
    assert held(store) == {(MINE, 4), (THEIRS, 4)}
    theirs = store.slab(THEIRS)
    assert theirs is not None
    assert [buffer.id for buffer in theirs.buffers] == [version(4), None]


def test_resuming_from_elsewhere_forgets_everything(store: ShardStore) -> None:
    fill(store)
    store.resume_from(None)
    assert not held(store)
    assert all(buffer.id is None for slab in store.slabs() for buffer in slab.buffers)


def test_a_worker_that_died_leaves_its_unfinished_version_and_nothing_else_behind(store: ShardStore) -> None:
    slab = store.own(MINE, 1000)
    write_version(slab.buffers[0], version(4), 1000)
    write_version(slab.buffers[1], version(5), 1000, until_byte=500)
    store.abandon_unfinished(MINE)
    store.abandon_unfinished(7)  # never heard of
    assert held(store) == {(MINE, 4)}
    assert slab.buffers[1].state is BufferState.EMPTY


def test_a_retrieval_goes_on_when_a_worker_dies_meanwhile(store: ShardStore) -> None:
    target = store.retrieval_target(MINE, version(5), 1000)
    target.begin(version(5), 1000, retrieved=True)
    store.abandon_unfinished(MINE)
    assert target.id == version(5)
    target.seal(1000)
    target.complete()


def test_a_corrupt_version_is_discarded_alone(store: ShardStore) -> None:
    fill(store)
    store.discard(MINE, version(5))
    store.discard(MINE, version(99))
    store.discard(42, version(5))
    assert held(store) == {(MINE, 4), (THEIRS, 4)}


# -- the job's shape ---------------------------------------------------------------------------------------------------


def test_memory_of_another_shape_is_kept_and_both_shapes_are_named(store: ShardStore) -> None:
    fill(store)
    for machines, nproc in ((3, 1), (2, 2), (1, 1)):
        with pytest.raises(LayoutMismatchError) as refusal:
            store.enter_generation(7, machines, nproc)
        assert "2 machines x 1 ranks" in str(refusal.value)
        assert f"{machines} x {nproc}" in str(refusal.value)
        assert "lightning-gemini stop" in str(refusal.value)
    assert (store.generation, store.machines, len(held(store))) == (1, 2, 3)


def test_an_empty_store_takes_any_shape(store: ShardStore) -> None:
    store.enter_generation(2, 8, 4)
    assert list(store.own_ranks()) == [0, 1, 2, 3]
    assert ShardStore(3).own_ranks() == range(0)


def test_generations_only_grow(store: ShardStore) -> None:
    store.enter_generation(5, 2, 1)
    store.enter_generation(3, 2, 1)
    assert store.generation == 5


def test_an_impossible_placement_changes_nothing(store: ShardStore) -> None:
    with pytest.raises(PlacementError, match="replicas=3 needs 3 machines, the job has 2"):
        store.set_replication(3, "mixed")
    assert (store.replicas, store.strategy) == (2, "mixed")


def test_a_rank_keeps_its_slab_over_restarts(store: ShardStore) -> None:
    assert store.own(MINE, 1000) is store.own(MINE, 5_000_000)


def test_a_slab_is_refused_with_the_whole_machine_in_mind(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda: 1024 * 2**20)
    with pytest.raises(CapacityError, match="2 buffers x 2 replicas x 1 ranks x 200 MiB = 800 MiB"):
        store.own(MINE, 200 * 2**20)  # this slab alone would fit
    assert not store.slabs()


def test_clearing_frees_everything(store: ShardStore) -> None:
    fill(store)
    slabs = store.slabs()
    assert store.total_bytes > 4 * 65536
    store.clear()
    store.clear()
    assert (store.total_bytes, store.slabs()) == (0, [])
    assert all(buffer.fd < 0 for slab in slabs for buffer in slab.buffers)


def test_one_writer_at_a_time_for_each_owner(store: ShardStore) -> None:
    assert store.writer(1) is store.writer(1)
    assert store.writer(1) is not store.writer(2)
    with store.writer(1):
        assert not store.wait_for_writers(0.05)
    assert store.wait_for_writers(0.05)
