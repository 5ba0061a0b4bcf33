"""When versions are taken, what is planned, and what leads to a new plan; on traces that are written here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_gemini.callbacks.traffic import TrafficScheduler
from lightning_gemini.callbacks.votes import Votes
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.core.idle_spans import Collective, IterationTrace
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.link_speed import LinkSpeed
from lightning_gemini.dataplane.pace_page import Pace
from lightning_gemini.dataplane.slab import Slab
from lightning_gemini.errors import ConfigurationError

SHARD = 1_000_000
ITERATION_S = 0.5
IDLE_S = (0.1, 0.2)


def trace(began_s: float, idle_s: tuple[float, ...] = IDLE_S, name: str = "all_gather") -> IterationTrace:
    """Idle, a collective, idle, another one which the step does not wait for."""
    first, second = began_s + idle_s[0], began_s + idle_s[0] + 0.1 + idle_s[1]
    collectives = (Collective(name, 1000, first, first + 0.1), Collective(name, 1000, second, second + 0.1))
    return IterationTrace(began_s, second + 0.1, 1, collectives)


@dataclass
class WrittenProfiler:
    """Gives the traces of iterations that the test describes."""

    idle_s: tuple[float, ...] = IDLE_S
    name: str = "all_gather"
    began: list[int] = field(default_factory=list)
    silent: bool = False

    def begin_iteration(self, label: int) -> tuple[int, IterationTrace] | None:
        self.began.append(label)
        if len(self.began) < 2 or self.silent:
            return None
        return self.began[-2], trace(float(label), self.idle_s, self.name)


class Alone:
    """The ranks of a job with one rank."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


class World:
    """Training steps, with a network that has every version committed after one iteration."""

    def __init__(self, slab: Slab, bandwidth: float = 1e8, **settings: Any) -> None:
        self.slab, self.profiler = slab, WrittenProfiler()
        self.told: list[tuple[str, dict[str, Any]]] = []
        config = CheckpointConfig(**{"profile_iterations": 4, "buffer_bytes": 65536, **settings})
        self.link: LinkSpeed | None = LinkSpeed(bandwidth, 1e-4)
        self.traffic = TrafficScheduler(
            config,
            slab,
            Alone(),  # type: ignore[arg-type]
            self.profiler,  # type: ignore[arg-type]
            lambda: self.link,
            2,
            lambda text, fields: self.told.append((text, fields)),
        )
        self.traffic.start()
        self.step, self.versions, self.waited_s = 0, list[int](), 0.0

    def run(self, iterations: int) -> None:
        for _ in range(iterations):
            self.step += 1
            committed = bool(self.versions) and self.versions[-1] == self.step - 1
            votes = self.traffic.votes
            agreed = Votes(votes.persist, votes.profile, votes.plan) if committed else Votes()
            self.traffic.begin_iteration(self.step, agreed, self.waited_s if committed else None)
            due = self.traffic.is_due(self.step)
            if due:
                self.versions.append(self.step)
                self.slab.buffers[len(self.versions) % 2].begin(VersionId(1, self.step), SHARD)
            self.traffic.iteration_begun(self.step, published=due, settled=not due)


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab.create(0, SHARD)
    yield made
    made.close()


def test_every_other_iteration_is_profiled_and_the_others_protect(slab: Slab) -> None:
    world = World(slab)
    world.run(9)
    assert world.versions == [1, 3, 5, 7, 9]
    assert world.traffic.plan is None
    assert slab.pace.pace is Pace.FREE
    world.run(11)
    assert world.traffic.plan is not None
    assert world.traffic.plan.profile.iterations == 4
    assert world.versions[-6:] == [15, 16, 17, 18, 19, 20], "every iteration has one from now on"
    assert slab.pace.pace is Pace.PACED
    (text, fields) = world.told[-1]
    assert "idle for 0.3 s" in text
    assert fields["fits"] is True
    assert fields["every"] == 1


def test_who_resumes_plans_with_the_profile_that_came_along(slab: Slab) -> None:
    before = World(slab)
    before.run(20)
    assert before.traffic.packed_profile is not None
    assert before.traffic.plan is not None
    after = World(slab)
    after.traffic.start(20, before.traffic.packed_profile)
    assert after.traffic.plan is not None
    assert after.traffic.plan.profile == before.traffic.plan.profile
    after.run(5)
    assert after.versions == [1, 2, 3, 4, 5]


def test_versions_are_taken_less_often_where_they_do_not_fit(slab: Slab) -> None:
    # One iteration has 0.8 * 0.3 s at 1.5 MB/s: 0.36 MB. Two more spans than the last one's need three iterations.
    world = World(slab, bandwidth=1.5e6)
    world.run(40)
    (text, fields) = world.told[-1]
    assert fields["every"] == 3
    assert "taking one every 3 iterations" in text
    assert {b - a for a, b in zip(world.versions[-4:], world.versions[-3:], strict=False)} == {3}


def test_the_users_interval_is_kept_where_more_would_fit(slab: Slab) -> None:
    world = World(slab, checkpoint_every=5)
    world.run(60)
    assert world.told[-1][1]["every"] == 5
    assert [version % 5 for version in world.versions] == [0] * len(world.versions)


def test_a_change_of_shape_leads_to_a_new_profile(slab: Slab) -> None:
    world = World(slab)
    world.run(20)
    world.profiler.name = "reduce_scatter"
    world.run(40)
    assert len(world.told) == 2
    assert world.traffic.plan is not None
    assert world.traffic.plan.profile.shape[0][0] == "reduce_scatter"


def test_longer_iterations_lead_to_a_new_profile(slab: Slab) -> None:
    world = World(slab)
    world.run(20)
    world.profiler.idle_s = (0.3, 0.4)
    world.run(40)
    assert len(world.told) == 2
    assert world.told[-1][1]["idle_s"] == pytest.approx(0.7)


def test_a_plan_that_keeps_making_training_wait_trusts_the_link_less(slab: Slab) -> None:
    world = World(slab)
    world.run(20)
    world.waited_s = 0.1
    world.run(40)
    assert len(world.told) >= 2
    assert world.told[1][1]["bandwidth_bytes_per_s"] == pytest.approx(0.8e8)


def test_a_backed_off_plan_is_looked_at_again(slab: Slab) -> None:
    world = World(slab, bandwidth=1.5e6)
    world.run(40)
    world.profiler.idle_s = (0.11, 0.21)  # too little a change to be noticed
    world.run(600)
    assert len(world.told) == 2


def test_without_a_repeating_pattern_versions_go_at_once(slab: Slab) -> None:
    world = World(slab)
    world.profiler.silent = True
    world.run(60)
    (text, fields) = world.told[-1]
    assert "unscheduled" in text
    assert fields["fits"] is None
    assert slab.pace.pace is Pace.FREE
    assert world.versions[-1] == 60
    assert world.versions[-2] == 59


def test_without_a_link_versions_go_at_once_and_it_is_tried_again(slab: Slab) -> None:
    world = World(slab)
    world.traffic._link, world.link = None, None
    world.run(20)
    assert "could not measure" in world.told[-1][0]
    assert slab.pace.pace is Pace.FREE


@pytest.mark.parametrize("scheme", ["eager", "blocking"])
def test_what_is_not_paced_goes_at_once(slab: Slab, scheme: str) -> None:
    world = World(slab)
    world.run(20)
    world.traffic.set_scheme(scheme)
    assert slab.pace.pace is Pace.FREE
    world.traffic.set_scheme("naive")
    assert slab.pace.pace is Pace.PACED
    found = slab.pace.plan()
    assert found is not None
    assert found.one_chunk
    first_ns = found.usable_ns[0]
    assert 40e6 <= first_ns < 80e6, "it needs little of a span of 100 ms"
    assert found.usable_ns == pytest.approx((first_ns, 2 * first_ns, 0), abs=2000)
    assert found.period_ns == pytest.approx((200e6, 300e6, 0), abs=1000)


def test_none_takes_no_version(slab: Slab) -> None:
    world = World(slab)
    world.run(20)
    world.traffic.set_scheme("none")
    before = list(world.versions)
    world.run(5)
    assert world.versions == before


def test_wrong_names_and_schemes_without_a_profile_are_refused(slab: Slab) -> None:
    world = World(slab)
    with pytest.raises(ConfigurationError, match=r"schedule must be one of interleaved, .*got 'eagre'"):
        world.traffic.set_scheme("eagre")
    config = CheckpointConfig(schedule="eager")
    alone = TrafficScheduler(config, slab, Alone(), None, lambda: None, 1, lambda *_: None)  # type: ignore[arg-type]
    alone.start()
    alone.set_scheme("blocking")
    with pytest.raises(ConfigurationError, match="needs a profile"):
        alone.set_scheme("interleaved")
    assert alone.is_due(1)
