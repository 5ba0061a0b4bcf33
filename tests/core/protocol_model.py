"""A small system that runs the buffer and commit protocol, as a graph of all its states.

Every machine has one rank. A state says what lies in each of a slab's two buffers, on the owner and on every holder,
what each replicator and each rank knows, and how far a recovery is. What may happen next, in any order and at any
time: a rank begins a version, finishes or fails its copy, takes part in the minimum, reads its outcome; a replica
begins, ends, breaks off; workers and machines die, and recoveries are overtaken by further failures.

Decisions come from the real functions: `writable_buffer`, `replica_place`, `newest_complete`, `superseded` and
`plan_recovery`. Whatever they decide depends on the order of versions alone, so versions are renumbered 1, 2, … in
every state. That makes the graph finite although training goes on for ever: exploring it checks runs of any length.
Machines that differ only in name are counted once.

States are flat tuples of integers, for speed. A buffer is ``v`` where version v is complete, ``-v`` while it is being
written, 0 otherwise.
"""

from __future__ import annotations

import enum
import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_gemini.core.consistency import (
    BufferView,
    replica_place,
    retrieval_place,
    superseded,
    writable_buffer,
)
from lightning_gemini.core.placement import plan_placement
from lightning_gemini.core.recovery import Holding, Inventory, VersionId, plan_recovery

State = tuple[int, ...]
Slab = tuple[int, int]
Move = tuple[str, State]


class Mutant(enum.Enum):
    """Protocols that are known to be wrong."""

    NONE = "the protocol as it is"
    EARLY_REUSE = "v-1 is reused once v is on this rank's own holders, before it is committed everywhere"
    EARLY_DELETE = "v-1 is deleted once v is complete locally, before its replica is acknowledged"
    HOLDERS_KEEP_THE_NEWEST = "holders are not told what was given up"
    NO_GIVING_UP = "a version that some rank cannot write is waited for"
    EARLY_ACKNOWLEDGEMENT = "a version counts as soon as one holder has it"
    STALE_REPLICAS = "a holder that resumed still takes in what the recovery went back behind"
    ONLY_OWNERS_KNOW = "a holder does not use what its own rank knows to be committed"
    EAGER_REFILLS = "a refill overwrites the older of two complete versions"


class BrokenPromiseError(AssertionError):
    """The protocol broke a promise in some state."""


NO_WORKER, READY, PENDING, COMPLETE, FAILED, HEARD_COMPLETE, HEARD_FAILED = range(7)
_HEARD = {PENDING: READY, COMPLETE: HEARD_COMPLETE, FAILED: HEARD_FAILED}
RUNNING, FENCING, RESUMING = range(3)


def _id(version: int) -> VersionId | None:
    return VersionId(1, version) if version else None


@functools.cache
def _views(slab: Slab) -> tuple[BufferView, BufferView]:
    one, two = (BufferView(_id(abs(buffer)), buffer > 0) for buffer in slab)
    return one, two


@functools.cache
def _writable(slab: Slab, committed: int) -> int | None:
    return writable_buffer(_views(slab), _id(committed))


@functools.cache
def _retrieval(slab: Slab, version: int, own: bool) -> int | None:
    return retrieval_place(_views(slab), VersionId(1, version), own=own)


@functools.cache
def _replica(slab: Slab, version: int, kept: int) -> tuple[Slab, int | None]:
    """The slab without what was given up, and the buffer to write."""
    place = replica_place(_views(slab), VersionId(1, version), _id(kept))
    one, two = (0 if index in place.given_up else buffer for index, buffer in enumerate(slab))
    return (one, two), place.index


@functools.cache
def _resumed(slab: Slab, loaded: int) -> Slab:
    worthless = superseded(_views(slab), _id(loaded))
    one, two = (0 if index in worthless else buffer for index, buffer in enumerate(slab))
    return one, two


@dataclass(frozen=True)
class _Places:
    """Where each field of a state begins."""

    own: int
    replica: int
    held: int
    newest: int
    committed: int
    noted: int
    floor: int
    loaded: int
    versions: int  # fields before this one are versions
    worker: int
    fenced: int
    resumed: int
    lost: int
    mode: int
    size: int


class Model:
    """All states of one small system.

    Args:
        machines: Machines, one rank each.
        replicas: Copies of every shard.
        mutant: What is wrong with the protocol.
        faults: Whether workers and machines die.
        given_up: How many versions that were given up may be about at once; with 0 every rank can write every version.
    """

    def __init__(
        self,
        machines: int,
        replicas: int,
        mutant: Mutant = Mutant.NONE,
        *,
        faults: bool = True,
        given_up: int = 1,
    ) -> None:
        self.machines, self.replicas, self.mutant = machines, replicas, mutant
        self._faults, self._given_up = faults, given_up
        self.placement = plan_placement(machines, replicas)
        self.links = [(owner, holder) for owner in range(machines) for holder in self.placement.holders(owner)[1:]]
        self._links_of = [[i for i, link in enumerate(self.links) if link[0] == o] for o in range(machines)]
        self._links_to = [[i for i, link in enumerate(self.links) if link[1] == h] for h in range(machines)]
        self.at = self._lay_out()
        self._symmetries = [operator.itemgetter(*order) for order in self._renamings()]
        self._survivors = functools.cache(self._count_survivors)
        self._plan = functools.cache(self._make_plan)

    def _lay_out(self) -> _Places:
        n, links = self.machines, len(self.links)
        sizes = [2 * n, 2 * links, links, n, n, n, 1, 1, 0, n, n, n, n, 1, 0]
        return _Places(*itertools.accumulate([0, *sizes[:-1]]))

    def start(self) -> State:
        """Empty memory, every rank about to train."""
        state = [0] * self.at.size
        for rank in range(self.machines):
            state[self.at.worker + rank] = READY
        return tuple(state)

    def after_a_give_up(self) -> State:
        """Version 1 is committed, 2 was given up but is on one holder of rank 0, and 3 is about to be committed."""
        at, state = self.at, list(self.start())
        state[: at.held] = [3, 1] * (at.held // 2)
        state[at.replica] = 2
        for rank in range(self.machines):
            state[at.newest + rank], state[at.committed + rank], state[at.noted + rank] = 3, 1, 1
        state[at.floor] = 1
        return self.canonical(state)

    # -- equal states --------------------------------------------------------------------------------------------------

    def _renamings(self) -> Iterator[list[int]]:
        """Orders of the fields that rename machines without changing who holds whose shards."""
        holders = [set(self.placement.holders(machine)) for machine in range(self.machines)]
        for names in itertools.permutations(range(self.machines)):
            if all({names[h] for h in holders[o]} == holders[names[o]] for o in range(self.machines)):
                yield self._renamed(names)

    def _renamed(self, names: tuple[int, ...]) -> list[int]:
        at, order = self.at, list(range(self.at.size))
        for old, new in enumerate(names):
            for side in (0, 1):
                order[at.own + 2 * old + side] = at.own + 2 * new + side
            for field in (at.newest, at.committed, at.noted, at.worker, at.fenced, at.resumed, at.lost):
                order[field + old] = field + new
        for old_link, (owner, holder) in enumerate(self.links):
            new_link = self.links.index((names[owner], names[holder]))
            order[at.held + old_link] = at.held + new_link
            for side in (0, 1):
                order[at.replica + 2 * old_link + side] = at.replica + 2 * new_link + side
        return order

    def canonical(self, state: list[int]) -> State:
        """The one of all equal states that stands for them."""
        at = self.at
        self._note_commit(state)
        self._forget_what_cannot_matter(state)
        for place in range(0, at.held, 2):
            if state[place] < state[place + 1]:
                state[place], state[place + 1] = state[place + 1], state[place]
        used = sorted({abs(version) for version in state[: at.versions]} | {0})
        if used[-1] != len(used) - 1:
            number = {version: index for index, version in enumerate(used)}
            for place in range(at.versions):
                version = state[place]
                state[place] = number[version] if version >= 0 else -number[-version]
        return min(renamed(state) for renamed in self._symmetries)

    def _note_commit(self, state: list[int]) -> None:
        """A version that is complete on all its holders counts from now on, whether anybody knows of it or not.

        And whatever machines were lost before, memory is as good as new.
        """
        at = self.at
        for version in self._own(state, 0):
            if version > 0 and version >= state[at.floor] and self._is_everywhere(state, version):
                state[at.floor] = version
                state[at.lost : at.lost + self.machines] = [0] * self.machines

    def _is_everywhere(self, state: list[int], version: int) -> bool:
        return all(version in self._own(state, machine) for machine in range(self.machines)) and all(
            version in self._replica(state, link) for link in range(len(self.links))
        )

    def _forget_what_cannot_matter(self, state: list[int]) -> None:
        """Nobody goes back behind the floor: what is complete below it is as good as an empty buffer.

        Nor does a replicator ask what a holder has but of the versions that its owner still has.
        """
        at = self.at
        floor = state[at.floor]
        for place in range(at.held):
            if 0 < state[place] < floor:
                state[place] = 0
        for link, (owner, _) in enumerate(self.links):
            held = state[at.held + link]
            if held and held not in map(abs, self._own(state, owner)):
                state[at.held + link] = 0

    # -- reading a state -----------------------------------------------------------------------------------------------

    def _own(self, state: State | list[int], machine: int) -> Slab:
        place = self.at.own + 2 * machine
        return state[place], state[place + 1]

    def _replica(self, state: State | list[int], link: int) -> Slab:
        place = self.at.replica + 2 * link
        return state[place], state[place + 1]

    def _acknowledged(self, state: State, rank: int, version: int) -> bool:
        enough = any if self.mutant is Mutant.EARLY_ACKNOWLEDGEMENT else all
        return enough(state[self.at.held + link] == version for link in self._links_of[rank])

    def describe(self, state: State) -> str:
        """A state for people."""
        at = self.at
        own = " ".join(f"{m}:{_show(self._own(state, m))}" for m in range(self.machines))
        copies = " ".join(f"{o}@{h}:{_show(self._replica(state, i))}" for i, (o, h) in enumerate(self.links))
        mode = ("running", "fencing", "resuming")[state[at.mode]]
        newest = state[at.newest : at.newest + self.machines]
        return f"{mode:9} own {own}  replicas {copies}  newest {newest} committed {state[at.floor]}"

    # -- promises ------------------------------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """Invariant 1: every set of fewer than m failed machines leaves a common version, once there was one.

        Not just any: the last one committed, or a newer one.
        """
        at = self.at
        floor = state[at.floor]
        lost = state[at.lost : at.lost + self.machines]
        if floor and self._survivors(state[: at.held], lost) < floor:
            raise BrokenPromiseError(
                f"version {floor} was committed, and fewer than {self.replicas} failures can lose it"
            )

    def _count_survivors(self, slabs: State, lost: State) -> int:
        """The newest version that is left whatever else fails; 0 where there is none."""
        gone = {machine for machine in range(self.machines) if lost[machine]}
        others = [machine for machine in range(self.machines) if machine not in gone]
        more = self.replicas - 1 - len(gone)
        return min(self._common(slabs, gone | set(failed)) for failed in itertools.combinations(others, more))

    def _common(self, slabs: State, failed: set[int]) -> int:
        common: set[int] | None = None
        for owner in range(self.machines):
            held = set() if owner in failed else set(self._own(slabs, owner))
            for link in self._links_of[owner]:
                if self.links[link][1] not in failed:
                    held |= set(self._replica(slabs, link))
            common = held if common is None else common & held
        return max((version for version in common or () if version > 0), default=0)

    def _make_plan(self, slabs: State) -> int:
        """The version that the real plan loads; 0: memory cannot serve."""
        inventories = []
        for machine in range(self.machines):
            held = [(machine, buffer) for buffer in self._own(slabs, machine)]
            held += [(self.links[i][0], buffer) for i in self._links_to[machine] for buffer in self._replica(slabs, i)]
            holdings = tuple(Holding(owner, VersionId(1, v), False) for owner, v in held if v > 0)
            inventories.append(Inventory(machine, holdings))
        plan = plan_recovery(self.placement, 1, inventories)
        return plan.id.version if plan.id else 0

    # -- what may happen next ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        """Every state that one step of somebody leads to, and what that step is; faults begin with ``!``."""
        for rank in range(self.machines):
            if state[self.at.worker + rank] != NO_WORKER:
                yield from self._worker_moves(state, rank)
        for link in range(len(self.links)):
            yield from self._replicator_moves(state, link)
        if state[self.at.mode] == FENCING:
            yield from self._fencing_moves(state)
        elif state[self.at.mode] == RESUMING:
            yield from self._resuming_moves(state)
        if self._faults:
            yield from self._fault_moves(state)

    def _changed(self, state: State, *changes: tuple[int, int]) -> State:
        new = list(state)
        for place, value in changes:
            new[place] = value
        return self.canonical(new)

    def _slab_changed(self, state: State, place: int, slab: Slab, *changes: tuple[int, int]) -> State:
        return self._changed(state, (place, slab[0]), (place + 1, slab[1]), *changes)

    # a rank

    def _worker_moves(self, state: State, rank: int) -> Iterator[Move]:
        at = self.at
        newest, committed, mode = state[at.newest + rank], state[at.committed + rank], state[at.worker + rank]
        slab, place = self._own(state, rank), at.own + 2 * rank
        if -newest in slab and newest:
            done: Slab = tuple(newest if buffer == -newest else buffer for buffer in slab)  # type: ignore[assignment]
            if self.mutant is Mutant.EARLY_DELETE:
                done = (newest, 0)
            yield f"{rank} copied {newest}", self._slab_changed(state, place, done)
            if self._may_fail(state, newest):
                yield f"{rank} failed to copy {newest}", self._slab_changed(state, place, _without(slab, newest))
        if mode == READY:
            if newest == committed or self._reuses_early(state, rank):
                yield self._publish(state, rank)
            else:
                yield self._contribute(state, rank)
        elif mode in (HEARD_COMPLETE, HEARD_FAILED):
            yield self._hear(state, rank, mode)

    def _may_fail(self, state: State, newest: int) -> bool:
        at = self.at
        about = {abs(version) for version in state[: at.held]} - {newest}
        return sum(version > state[at.floor] for version in about) < self._given_up

    def _reuses_early(self, state: State, rank: int) -> bool:
        newest = state[self.at.newest + rank]
        complete = newest in self._own(state, rank) and self._acknowledged(state, rank, newest)
        return self.mutant is Mutant.EARLY_REUSE and complete

    def _publish(self, state: State, rank: int) -> Move:
        """The same version as the ranks that are ahead, else a new one: ranks publish at the same steps."""
        at = self.at
        newest = state[at.newest + rank]
        others = zip(state[at.newest : at.committed], state[at.worker : at.fenced], strict=True)
        ahead = [other for other, worker in others if other > newest and worker != HEARD_FAILED]
        version = min(ahead, default=1 + max(map(abs, state[: at.versions])))
        committed = newest if self.mutant is Mutant.EARLY_REUSE else state[at.committed + rank]
        slab = self._own(state, rank)
        index = _writable(slab, committed)
        if index is not None:
            slab = (-version, slab[1]) if index == 0 else (slab[0], -version)
        return f"{rank} began {version}", self._slab_changed(
            state, at.own + 2 * rank, slab, (at.newest + rank, version)
        )

    def _contribute(self, state: State, rank: int) -> Move:
        at, newest = self.at, state[self.at.newest + rank]
        slab = self._own(state, rank)
        if newest in slab and self._acknowledged(state, rank, newest):
            value = COMPLETE
        elif newest not in slab and -newest not in slab and self.mutant is not Mutant.NO_GIVING_UP:
            value = FAILED
        else:
            value = PENDING
        workers = list(state[at.worker : at.worker + self.machines])
        workers[rank] = value
        if all(worker in _HEARD for worker in workers):
            newests = {state[at.newest + other] for other in range(self.machines)}
            if len(newests) > 1 and self.mutant is not Mutant.EARLY_REUSE:
                raise BrokenPromiseError(f"ranks agree about different versions: {newests}")
            lowest = min(workers, key=[FAILED, PENDING, COMPLETE].index)
            workers = [_HEARD[lowest]] * self.machines
        said = {COMPLETE: "complete", PENDING: "pending", FAILED: "failed"}[value]
        return f"{rank} says {newest} is {said}", self._changed(state, *enumerate(workers, at.worker))

    def _hear(self, state: State, rank: int, heard: int) -> Move:
        at, newest = self.at, state[self.at.newest + rank]
        ready = (at.worker + rank, READY)
        if heard == HEARD_COMPLETE:
            known = [(place + rank, newest) for place in (at.committed, at.noted)]
            floor = (at.floor, max(state[at.floor], newest))
            return f"{rank} learns that {newest} is COMMITTED", self._changed(state, ready, *known, floor)
        slab = _without(self._own(state, rank), newest)
        given_up = (at.newest + rank, state[at.committed + rank])
        return f"{rank} gives {newest} up", self._slab_changed(state, at.own + 2 * rank, slab, ready, given_up)

    # a replicator and its holder

    def _replicator_moves(self, state: State, link: int) -> Iterator[Move]:
        at, (owner, holder) = self.at, self.links[link]
        slab, place = self._replica(state, link), at.replica + 2 * link
        coming = -min(slab)
        linked = state[at.fenced + owner] == state[at.fenced + holder]
        if coming > 0:
            name = f"{owner}→{holder}"
            if linked and coming in map(abs, self._own(state, owner)):  # its last byte leaves before it counts there
                done = _put(slab, slab.index(-coming), coming)
                yield f"{name} has {coming}", self._slab_changed(state, place, done, (at.held + link, coming))
            else:
                yield f"{name} broke off {coming}", self._slab_changed(state, place, _without(slab, coming))
        elif linked:
            yield from self._push(state, link)

    def _push(self, state: State, link: int) -> Iterator[Move]:
        at, (owner, holder) = self.at, self.links[link]
        own, slab, place = self._own(state, owner), self._replica(state, link), at.replica + 2 * link
        version = max(map(abs, own))
        if not version or state[at.held + link] == version:
            return
        if state[at.resumed + holder] and version > state[at.loaded] and self.mutant is not Mutant.STALE_REPLICAS:
            return  # refused: a recovery went back behind it
        name = f"{owner}→{holder}"
        if version in slab:
            yield f"{name} has {version} already", self._changed(state, (at.held + link, version))
            return
        left, index = _replica(slab, version, self._kept(state, link, version))
        if index is not None:
            left = (-version, left[1]) if index == 0 else (left[0], -version)
        if left != slab:
            yield f"{name} sends {version}", self._slab_changed(state, place, left)

    def _kept(self, state: State, link: int, version: int) -> int:
        """The last version committed, as far as owner or holder know: either may be a new machine."""
        owner, holder = self.links[link]
        known = [state[self.at.noted + owner]]
        if not known[0]:
            known = [buffer for buffer in self._own(state, owner) if buffer > 0]
        if self.mutant is not Mutant.ONLY_OWNERS_KNOW:
            known.append(state[self.at.noted + holder])
        if self.mutant is Mutant.HOLDERS_KEEP_THE_NEWEST:
            known = []
        return max((kept for kept in known if kept < version), default=0)

    def _source(self, state: State, owner: int, version: int) -> bool:
        links = self._links_of[owner]
        return version in self._own(state, owner) or any(version in self._replica(state, link) for link in links)

    # failures and recovery

    def _fault_moves(self, state: State) -> Iterator[Move]:
        at = self.at
        if state[at.mode] != FENCING or any(state[at.fenced : at.fenced + self.machines]):
            yield "! a worker dies", self.canonical(self._interrupted(state))
        lost = sum(state[at.lost : at.lost + self.machines])
        for machine in range(self.machines):
            if lost + 1 - state[at.lost + machine] < self.replicas:
                yield f"! machine {machine} is lost", self._without_machine(state, machine)

    def _interrupted(self, state: State) -> list[int]:
        """A new generation will begin; until a machine hears of it, its survivors go on."""
        at, new = self.at, list(state)
        new[at.mode], new[at.loaded] = FENCING, 0
        for machine in range(self.machines):
            new[at.fenced + machine] = new[at.resumed + machine] = 0
        return new

    def _without_machine(self, state: State, machine: int) -> State:
        """It is replaced by an empty one, which is of the new generation from its start."""
        at, new = self.at, self._interrupted(state)
        for place in (*range(at.own + 2 * machine, at.own + 2 * machine + 2), at.noted + machine):
            new[place] = 0
        for link in self._links_to[machine]:
            new[at.replica + 2 * link] = new[at.replica + 2 * link + 1] = 0
        new[at.lost + machine] = 1
        self._end_generation(new, machine)
        return self.canonical(new)

    def _end_generation(self, new: list[int], machine: int) -> None:
        at = self.at
        new[at.fenced + machine] = 1
        new[at.worker + machine] = NO_WORKER
        new[at.newest + machine] = new[at.committed + machine] = 0
        for link in self._links_of[machine]:
            new[at.held + link] = 0
        slabs = [at.own + 2 * machine, *(at.replica + 2 * link for link in self._links_to[machine])]
        for place in (place + side for place in slabs for side in (0, 1)):
            new[place] = max(0, new[place])

    def _fencing_moves(self, state: State) -> Iterator[Move]:
        at = self.at
        for machine in range(self.machines):
            if not state[at.fenced + machine]:
                new = list(state)
                self._end_generation(new, machine)
                yield f"{machine} ends its generation", self.canonical(new)
        if all(state[at.fenced : at.fenced + self.machines]):
            yield self._planned(state)

    def _planned(self, state: State) -> Move:
        at = self.at
        loaded, floor = self._plan(state[: at.held]), state[at.floor]
        if loaded < floor:
            raise BrokenPromiseError(f"the plan goes back to version {loaded}, although {floor} was committed")
        return f"everybody plans to load {loaded}", self._changed(state, (at.mode, RESUMING), (at.loaded, loaded))

    def _resuming_moves(self, state: State) -> Iterator[Move]:
        at, loaded = self.at, state[self.at.loaded]
        everybody_has_it = not loaded or all(loaded in self._own(state, machine) for machine in range(self.machines))
        for machine in range(self.machines):
            slab, place = self._own(state, machine), at.own + 2 * machine
            if loaded and loaded not in slab:
                yield from self._retrieval_moves(state, machine, slab, place, loaded)
            elif everybody_has_it and not state[at.resumed + machine]:
                yield self._resume(state, machine)
        for link, (owner, holder) in enumerate(self.links):
            slab, place = self._replica(state, link), at.replica + 2 * link
            index, eager = None, self.mutant in (Mutant.EAGER_REFILLS, Mutant.STALE_REPLICAS)
            if loaded and loaded not in slab and min(slab) >= 0:
                index = _retrieval(slab, loaded, eager)
            if index is not None and self._source(state, owner, loaded):
                refilled = _put(slab, index, loaded)
                yield f"{owner}→{holder} refilled with {loaded}", self._slab_changed(state, place, refilled)
        if all(state[at.resumed : at.resumed + self.machines]):
            yield "everybody resumes", self._running(state)

    def _retrieval_moves(self, state: State, machine: int, slab: Slab, place: int, loaded: int) -> Iterator[Move]:
        if not any(loaded in self._replica(state, link) for link in self._links_of[machine]):
            yield f"{machine} finds no {loaded} any more: everybody plans anew", self._unplanned(state)
        elif -loaded in slab:
            yield (
                f"{machine} retrieved {loaded}",
                self._slab_changed(state, place, _put(slab, slab.index(-loaded), loaded)),
            )
        else:
            began = _put(slab, _retrieval(slab, loaded, True), -loaded)
            yield f"{machine} begins to retrieve {loaded}", self._slab_changed(state, place, began)

    def _unplanned(self, state: State) -> State:
        at, new = self.at, list(state)
        new[at.mode], new[at.loaded] = FENCING, 0
        new[at.own : at.replica] = [max(0, buffer) for buffer in state[at.own : at.replica]]
        return self.canonical(new)

    def _resume(self, state: State, machine: int) -> Move:
        at, loaded, new = self.at, state[self.at.loaded], list(state)
        slabs = [at.own + 2 * machine, *(at.replica + 2 * link for link in self._links_to[machine])]
        for place in slabs:
            new[place : place + 2] = _resumed((state[place], state[place + 1]), loaded)
        new[at.resumed + machine] = 1
        return f"{machine} goes on from {loaded}", self.canonical(new)

    def _running(self, state: State) -> State:
        """As after the barrier: everybody has the version, nobody knows whether it is committed."""
        at, new = self.at, list(state)
        new[at.mode], new[at.loaded] = RUNNING, 0
        for rank in range(self.machines):
            if state[at.loaded] and state[at.loaded] not in self._own(state, rank):
                raise BrokenPromiseError(f"rank {rank} goes on without version {state[at.loaded]}")
            new[at.newest + rank] = state[at.loaded]
            new[at.worker + rank] = READY
            new[at.fenced + rank] = new[at.resumed + rank] = 0
        return self.canonical(new)


def _put(slab: Slab, index: int | None, buffer: int) -> Slab:
    assert index is not None
    return (buffer, slab[1]) if index == 0 else (slab[0], buffer)


def _without(slab: Slab, version: int) -> Slab:
    one, two = (0 if abs(buffer) == version else buffer for buffer in slab)
    return one, two


def _show(slab: Slab) -> str:
    return "[" + " ".join(str(b) if b > 0 else f"({-b}…)" if b else "-" for b in slab) + "]"
