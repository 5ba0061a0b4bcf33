"""Every order of events in small systems: no committed version is ever lost, none is mixed, and none is the last.

What is shown of these systems holds for runs of any length, see `tests.core.protocol_model`. The same search finds what
is wrong with protocols that are known to be wrong.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from tests.core.protocol_model import BrokenPromiseError, Model, Mutant, State

COMMITTED = "COMMITTED"


@dataclass
class Exploration:
    """All states of a model, found breadth first: the way to each is a shortest one."""

    model: Model
    came_by: dict[State, tuple[State, str] | None] = field(default_factory=dict)
    before: dict[State, list[State]] = field(default_factory=dict)  # without failures
    committing: list[State] = field(default_factory=list)  # states in which a commit can be learned at once
    moves: int = 0

    def run(self, start: State | None = None) -> Exploration:
        start = start or self.model.canonical(list(self.model.start()))
        self.came_by[start] = None
        queue = deque([start])
        while queue:
            state = queue.popleft()
            try:
                self.model.check(state)
                for name, after in self.model.moves(state):
                    self.moves += 1
                    if after not in self.came_by:
                        self.came_by[after] = state, name
                        queue.append(after)
                    self._note(state, name, after)
            except BrokenPromiseError as violation:
                raise BrokenPromiseError(f"{violation}\n{self.trace(state)}") from None
        return self

    def _note(self, state: State, name: str, after: State) -> None:
        if COMMITTED in name:
            self.committing.append(state)
        elif not name.startswith("!"):
            self.before.setdefault(after, []).append(state)

    def trace(self, state: State) -> str:
        """What led to this state; machines that differ only in name may change names on the way."""
        lines = [f"   {self.model.describe(state)}"]
        while (step := self.came_by[state]) is not None:
            state, name = step
            lines += [f"-> {name}", f"   {self.model.describe(state)}"]
        return "\n".join(reversed(lines))

    def stuck(self) -> State | None:
        """The first state from which no commit can be reached, unless something fails."""
        alive, queue = set(self.committing), deque(self.committing)
        while queue:
            for state in self.before.get(queue.popleft(), ()):
                if state not in alive:
                    alive.add(state)
                    queue.append(state)
        return next((state for state in self.came_by if state not in alive), None)

    def report(self) -> None:
        model = self.model
        print(f"{model.machines} machines, m={model.replicas}: {len(self.came_by)} states, {self.moves} moves")


SYSTEMS = {
    "two machines, everything happens": Model(2, 2),
    "two machines, many versions are given up": Model(2, 2, faults=False, given_up=2),
    "three machines, m=2, nothing fails": Model(3, 2, faults=False, given_up=0),
    "three machines, m=3, nothing fails": Model(3, 3, faults=False, given_up=0),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_order_of_events_loses_a_committed_version_or_stops_committing(system: str) -> None:
    """Invariants 1 and 2 in every state, whatever set of fewer than m machines is lost in it; and no permanent skip."""
    explored = Exploration(SYSTEMS[system]).run()
    explored.report()
    assert explored.committing
    stuck = explored.stuck()
    assert stuck is None, f"nothing can ever be committed again:\n{explored.trace(stuck)}"


WRONG = {
    Mutant.EARLY_REUSE: Model(2, 2, Mutant.EARLY_REUSE, faults=False, given_up=0),
    Mutant.EARLY_DELETE: Model(2, 2, Mutant.EARLY_DELETE, faults=False, given_up=0),
    Mutant.EARLY_ACKNOWLEDGEMENT: Model(3, 3, Mutant.EARLY_ACKNOWLEDGEMENT, faults=False, given_up=0),
    Mutant.HOLDERS_KEEP_THE_NEWEST: Model(2, 2, Mutant.HOLDERS_KEEP_THE_NEWEST, faults=False),
    Mutant.STALE_REPLICAS: Model(2, 2, Mutant.STALE_REPLICAS, given_up=0),
    Mutant.EAGER_REFILLS: Model(2, 2, Mutant.EAGER_REFILLS),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_protocol_is_caught(mutant: Mutant) -> None:
    exploration = Exploration(WRONG[mutant])
    with pytest.raises(BrokenPromiseError, match=r"was committed, and fewer than \d failures") as caught:
        exploration.run()
    trace = str(caught.value)
    assert trace.count("-> ") >= 5, "the promise cannot be broken before something was committed"
    print(f"{mutant.value}: caught after {len(exploration.came_by)} states\n{trace}")


def test_replaced_owners_that_know_nothing_are_caught_where_holders_do_not_help() -> None:
    """Three machines with failures have too many states to see all; the first thousands from a certain one do."""
    model = Model(3, 3, Mutant.ONLY_OWNERS_KNOW, given_up=0)
    exploration = Exploration(model)
    with pytest.raises(BrokenPromiseError) as caught:
        exploration.run(model.after_a_give_up())
    assert "machine" in str(caught.value)
    print(f"{Mutant.ONLY_OWNERS_KNOW.value}: caught after {len(exploration.came_by)} states\n{caught.value}")


def test_a_protocol_that_stops_committing_is_caught() -> None:
    explored = Exploration(Model(2, 2, Mutant.NO_GIVING_UP, faults=False)).run()
    stuck = explored.stuck()
    assert stuck is not None
    trace = explored.trace(stuck)
    assert "failed to copy" in trace
    print(f"{Mutant.NO_GIVING_UP.value}: nothing is committed after\n{trace}")


@pytest.mark.parametrize("replicas", [2, 3])
def test_long_runs_of_three_machines_with_failures(replicas: int, seed: int) -> None:
    """Too many states to see all of them: long walks at random, in which everything happens again and again."""
    model, choices = Model(3, replicas), random.Random(seed)
    commits = failures = 0
    for start in (model.start(), model.after_a_give_up()):
        state = model.canonical(list(start))
        for _ in range(1500):
            model.check(state)
            moves = list(model.moves(state))
            calm = [move for move in moves if not move[0].startswith("!")]
            name, state = choices.choice(moves if not calm or choices.random() < 0.03 else calm)
            commits += COMMITTED in name
            failures += name.startswith("!")
    print(f"3 machines, m={replicas}: {commits} commits learned, {failures} failures")
    assert commits > 20
    assert failures > 10
