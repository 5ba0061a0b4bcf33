"""Decides when a version is taken and how it travels, from what training leaves of the network (GEMINI, section 5).

At first every other iteration carries no checkpoint traffic and is profiled; the others send their versions at once, so
that training is protected from its first step on. With the profile all ranks plan together: how often a version is
taken, and what of every idle span may be used. The agent then sends by that plan, see
:mod:`~lightning_gemini.dataplane.pacer`. What changes later leads to a new profile, agreed on along with a commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lightning_gemini.callbacks.ranks import RankGroup
from lightning_gemini.callbacks.traffic_plan import Plan, Planner, figures, sentence
from lightning_gemini.callbacks.votes import Votes
from lightning_gemini.config import SCHEDULES, CheckpointConfig
from lightning_gemini.core.drift import DriftWatch
from lightning_gemini.core.idle_spans import IdleProfile, IterationTrace, average
from lightning_gemini.core.scheme import Scheme
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.link_speed import LinkSpeed
from lightning_gemini.dataplane.profiler import Profiler
from lightning_gemini.dataplane.slab import Slab
from lightning_gemini.errors import ConfigurationError

log = logging.getLogger(__name__)

_PATIENCE = 5  # profiling is given up after so many times the iterations that it should take
_REVISIT_ITERATIONS = 500
_LEAST_SHARE = 0.25
_LESS = 0.8


class TrafficScheduler:
    """One rank's side of it; every decision that ranks must share is made by all of them at the same boundary.

    Args:
        config: The strategy's settings.
        slab: This rank's slab.
        group: All ranks.
        profiler: Records training's collectives; ``None`` where nothing is to be scheduled.
        measure_link: Collective; this rank's share of the way to its holders, ``None`` where that cannot be told.
        replicas: Copies of every shard, the owner's own included.
        announce: Takes what was decided, as a sentence and as fields; the same on every rank.

    Attributes:
        scheme: In force.
        plan: In force; ``None`` as long as there is no profile.
        last_trace: The last iteration that the profiler finished.
        packed_profile: What the plan was made from; goes into every version, so that who resumes need not profile anew.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        slab: Slab,
        group: RankGroup,
        profiler: Profiler | None,
        measure_link: Callable[[], LinkSpeed | None],
        replicas: int,
        announce: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._config, self._slab, self._group, self._profiler = config, slab, group, profiler
        self._measure_link, self._announce = measure_link, announce
        self._planner = Planner(config, replicas)
        self.scheme = Scheme(config.schedule)
        self.plan: Plan | None = None
        self.last_trace: IterationTrace | None = None
        self.packed_profile: bytes | None = None
        self.votes = Votes()
        self._every = config.checkpoint_every
        self._link: LinkSpeed | None = None
        self._share = 1.0  # of the measured bandwidth, where plans that count on all of it keep failing
        self._watch: DriftWatch | None = None
        self._planned_at = 0
        self._profiling = profiler is not None
        self._traces: list[IterationTrace] = []
        self._candidate: IdleProfile | None = None
        self._begun: dict[int, tuple[Scheme, bool]] = {}  # iterations without a trace yet: scheme, whether quiet
        self._quiet_begun = 0
        self._rested = True

    def start(self, step: int = 0, packed_profile: bytes | None = None) -> None:
        """Measure the link, before the first step; and plan with the profile that came with the version. Collective.

        Args:
            step: Optimizer steps completed.
            packed_profile: See :attr:`packed_profile`; ``None`` where training starts anew.
        """
        if self._profiler is None:
            return self._planner.apply(self._slab.pace, self.scheme, None)
        self._link = self._measure_link()
        known = packed_profile is not None and self._slab.newest_started() is not None
        if not all(self._group.gather(known)):
            return self._planner.apply(self._slab.pace, self.scheme, None)
        assert packed_profile is not None
        self._candidate = shard.unpack(packed_profile)
        return self._make_plan(step)

    def set_scheme(self, name: str) -> None:
        """Change the scheme, at a boundary between two iterations and on every rank alike.

        Raises:
            ConfigurationError: There is no such scheme, or it needs a profile and training started without one.
        """
        if name not in SCHEDULES:
            raise ConfigurationError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
        if Scheme(name).paced and self._profiler is None:
            raise ConfigurationError(f"schedule {name!r} needs a profile: start with it, and with 2 replicas or more")
        self.scheme = Scheme(name)
        self._planner.apply(self._slab.pace, self.scheme, self.plan)
        self._watch_plan()

    # -- at every boundary, in this order ----------------------------------------------------------------------------

    def begin_iteration(self, step: int, agreed: Votes, waited_s: float | None) -> None:
        """An iteration is over and the next one begins. Collective where ``agreed`` says that all can plan.

        Args:
            step: Optimizer steps completed.
            agreed: What all ranks voted.
            waited_s: Seconds that training waited for the version just committed, if one was.
        """
        if self._profiler is None:
            return
        finished = self._profiler.begin_iteration(step)
        if finished is not None:
            self._take(*finished)
        if waited_s is not None and self.scheme.paced:
            self._take_wait(waited_s)
        if agreed.plan and self._profiling:
            self._make_plan(step)
        elif agreed.profile and not self._profiling:
            self._profile_again()
        elif not self._profiling and step - self._planned_at >= _REVISIT_ITERATIONS and self._backed_off:
            self._share = min(1.0, self._share / _LESS)
            self._wish_profile("time to look whether versions can be taken more often")

    def is_due(self, step: int) -> bool:
        """Whether the state after ``step`` optimizer steps is to become a version, if nothing is under way."""
        if self.scheme is Scheme.NONE:
            return False
        if not self.scheme.paced:
            return step % self._config.checkpoint_every == 0
        return step % self._every == 0 and (self._rested or not self._profiling)

    def iteration_begun(self, step: int, *, published: bool, settled: bool) -> None:
        """Says whether the iteration that begins carries a version, or still something of an older one."""
        self._begun[step] = self.scheme, settled and not published
        if published:
            self._rested = False
        elif settled:
            self._rested = True
            self._quiet_begun += 1
            if self._profiling and self._quiet_begun > _PATIENCE * self._config.profile_iterations:
                self.votes.plan = True

    # -- profiling -----------------------------------------------------------------------------------------------------

    def _take(self, label: int, trace: IterationTrace) -> None:
        self.last_trace = trace
        scheme, quiet = self._begun.get(label, (self.scheme, False))
        self._begun = {other: begun for other, begun in self._begun.items() if other > label}
        if self._profiling and quiet and not self.votes.plan:
            self._collect(trace)
        elif self._watch is not None and scheme.paced and (reason := self._watch.take_iteration(trace)):
            self._wish_profile(reason)

    def _take_wait(self, waited_s: float) -> None:
        reason = self._watch.take_wait(waited_s) if self._watch is not None else None
        if reason is not None and not self.votes.profile:
            self._share = max(_LEAST_SHARE, self._share * _LESS)
            self._wish_profile(reason)

    def _collect(self, trace: IterationTrace) -> None:
        if self._traces and self._traces[-1].shape != trace.shape:
            self._traces.clear()
        self._traces.append(trace)
        if len(self._traces) >= self._config.profile_iterations:
            self._candidate = average(self._traces)
            self.votes.plan = True

    def _wish_profile(self, reason: str) -> None:
        if not self.votes.profile:
            self.votes.profile = True
            log.info("a new profile of the network's idle spans is wanted: %s", reason)

    def _profile_again(self) -> None:
        self._profiling, self._candidate, self._quiet_begun = True, None, 0
        self._traces.clear()
        self.votes.profile = self.votes.plan = False
        self._watch = None

    # -- planning ------------------------------------------------------------------------------------------------------

    @property
    def _backed_off(self) -> bool:
        return self.plan is None or self._every > self._config.checkpoint_every

    def _make_plan(self, step: int) -> None:
        if None in self._group.gather(self._link):
            self._link = self._measure_link()
        self.plan = self._own_plan()
        told = self._group.gather(self.plan and figures(self.plan))
        self._profiling, self._planned_at = False, step
        self.votes.plan = self.votes.profile = False
        self._candidate = None
        self._traces.clear()
        if self.plan is None or None in told:
            self._go_unscheduled(told.index(None))
        else:
            self._follow(self.plan, told)
        self._planner.apply(self._slab.pace, self.scheme, self.plan)

    def _own_plan(self) -> Plan | None:
        newest = self._slab.newest_started()
        if self._candidate is None or self._link is None or newest is None:
            return None
        link = LinkSpeed(self._link.bandwidth_bytes_per_s * self._share, self._link.startup_s)
        scheme = self.scheme if self.scheme.paced else Scheme.INTERLEAVED
        return self._planner.plan(scheme, self._candidate, link, newest.data_bytes)

    def _go_unscheduled(self, rank: int) -> None:
        self.plan = self._watch = self.packed_profile = None
        self._every = self._config.checkpoint_every
        text = (
            f"checkpoints travel unscheduled: rank {rank} found no repeating pattern of idle spans, or could not "
            "measure its link"
        )
        self._announce(text, {"scheme": self.scheme.value, "every": self._every, "fits": None})

    def _follow(self, plan: Plan, told: list[dict[str, Any]]) -> None:
        aim = self._config.checkpoint_every
        slowest = max(told, key=lambda each: (each["every"], each["overhead"]))
        self._every = max(aim, slowest["every"])
        self.packed_profile = shard.pack(plan.profile)
        self._watch_plan()
        fits = self._every == aim and slowest["overhead"] <= self._config.overhead_budget
        fields = {**slowest, "scheme": self.scheme.value, "every": self._every, "fits": fits}
        self._announce(sentence(slowest, self._every, aim), fields)

    def _watch_plan(self) -> None:
        if self.plan is not None and not self._profiling:
            budget_s = self._config.overhead_budget * self._every * self.plan.profile.iteration_s
            self._watch = DriftWatch(self.plan.profile, budget_s)

    # -- the local copy ------------------------------------------------------------------------------------------------

    def may_copy(self) -> bool:
        """Whether the owner's own copy goes on now: while training communicates, or the next chunk needs it."""
        page, plan = self._slab.pace, self.plan
        if plan is None or not self.scheme.paced or not page.span().open:
            return True
        newest = self._slab.newest_started()
        if newest is None:
            return True
        return newest.chunks_ready * newest.chunk_bytes < page.sent + plan.chunking.window_bytes + newest.chunk_bytes
