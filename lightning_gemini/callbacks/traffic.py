"""Decides when a version is taken and how it travels, from what training leaves of the network (GEMINI, section 5).

At first every other iteration carries no checkpoint traffic and is profiled; the others send their versions at once, so
that training is protected from its first step on. With the profile all ranks plan together: how often a version is
taken, and what of every idle span may be used. The agent then sends by that plan, see
:mod:`~lightning_gemini.dataplane.pacer`. What changes later leads to a new profile, agreed on along with a commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_gemini.callbacks.publisher import Votes
from lightning_gemini.callbacks.ranks import RankGroup
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.core.drift import DriftWatch
from lightning_gemini.core.frequency import Cadence, choose_every
from lightning_gemini.core.idle_spans import IdleProfile, IterationTrace, average
from lightning_gemini.core.scheme import Chunking, Scheme, chunking
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.link_speed import LinkSpeed
from lightning_gemini.dataplane.pace_page import Pace
from lightning_gemini.dataplane.profiler import Profiler
from lightning_gemini.dataplane.slab import Slab
from lightning_gemini.errors import ConfigurationError, GeminiError

log = logging.getLogger(__name__)

_MOST_ITERATIONS = 1000
_PATIENCE = 5  # profiling is given up after so many times the iterations that it should take
_REVISIT_ITERATIONS = 500
_LEAST_SHARE = 0.25
_LESS = 0.8
_CHUNK_S = 0.002
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 16 << 10, 32 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank makes of its profile.

    Attributes:
        profile: Its idle spans.
        cadence: How often a version fits.
        chunking: How it is cut.
        link: How fast it travels.
    """

    profile: IdleProfile
    cadence: Cadence
    chunking: Chunking
    link: LinkSpeed


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
        self._measure_link, self._replicas, self._announce = measure_link, replicas, announce
        self.scheme = Scheme(config.schedule)
        self.plan: Plan | None = None
        self.last_trace: IterationTrace | None = None
        self.packed_profile: torch.Tensor | None = None
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

    def start(self, step: int = 0, packed_profile: torch.Tensor | None = None) -> None:
        """Measure the link, before the first step; and plan with the profile that came with the version. Collective.

        Args:
            step: Optimizer steps completed.
            packed_profile: See :attr:`packed_profile`; ``None`` where training starts anew.
        """
        if self._profiler is None:
            return self._apply()
        self._link = self._measure_link()
        if None in self._group.gather(None if self._slab.newest_started() is None else packed_profile):
            return self._apply()
        self._candidate = shard.unpack(packed_profile)
        return self._make_plan(step)

    def set_scheme(self, name: str) -> None:
        """Change the scheme, at a boundary between two iterations and on every rank alike.

        Raises:
            ConfigurationError: There is no such scheme, or it needs a profile and training started without one.
        """
        if name not in [scheme.value for scheme in Scheme]:
            raise ConfigurationError(f"schedule must be one of {', '.join(Scheme)}, got {name!r}")
        if Scheme(name).paced and self._profiler is None:
            raise ConfigurationError(f"schedule {name!r} needs a profile: start with it, and with 2 replicas or more")
        self.scheme = Scheme(name)
        self._apply()
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
        if waited_s is not None and self._watch is not None and self.scheme.paced:
            if (reason := self._watch.take_wait(waited_s)) and not self.votes.profile:
                self._share = max(_LEAST_SHARE, self._share * _LESS)
                self._wish_profile(reason)
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
        told = self._group.gather(self.plan and _figures(self.plan))
        self._profiling, self._planned_at, self.votes.plan = False, step, False
        self._candidate = None
        self._traces.clear()
        if self.plan is None or None in told:
            self.plan, self._watch, self._every = None, None, self._config.checkpoint_every
            self.packed_profile = None
            self._tell_unscheduled(told.index(None))
        else:
            self._every = max(self._config.checkpoint_every, *(figures["every"] for figures in told))
            self.packed_profile = shard.pack(self.plan.profile)
            self._watch_plan()
            self._tell(max(told, key=lambda figures: (figures["every"], figures["overhead"])))
        self._apply()

    def _watch_plan(self) -> None:
        if self.plan is not None:
            budget_s = self._config.overhead_budget * self._every * self.plan.profile.iteration_s
            self._watch = DriftWatch(self.plan.profile, budget_s)

    def _own_plan(self) -> Plan | None:
        newest = self._slab.newest_started()
        if self._candidate is None or self._link is None or newest is None:
            return None
        link = LinkSpeed(self._link.bandwidth_bytes_per_s * self._share, self._link.startup_s)
        try:
            return self._plan_for(self._candidate, link, newest.data_bytes)
        except GeminiError as error:
            log.warning("cannot schedule checkpoint traffic: %s", error)
            return None

    def _plan_for(self, profile: IdleProfile, link: LinkSpeed, shard_bytes: int) -> Plan:
        scheme = self.scheme if self.scheme.paced else Scheme.INTERLEAVED
        cut = chunking(scheme, shard_bytes, self._buffer_bytes(link), self._config.sub_buffers)
        cadence = choose_every(
            profile.means_s,
            profile.deadline,
            profile.iteration_s,
            shard_bytes,
            budget=self._config.overhead_budget,
            limit=_MOST_ITERATIONS,
            replicas=self._replicas,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            startup_s=link.startup_s,
            buffer_bytes=cut.window_bytes,
            sub_buffers=cut.sub_buffers,
            safety=self._config.safety,
        )
        return Plan(profile, cadence, cut, link)

    def _buffer_bytes(self, link: LinkSpeed) -> int:
        if self._config.buffer_bytes is not None:
            return self._config.buffer_bytes
        if self._config.transport == "p2p":
            return 128 << 20
        chunk_bytes = int(link.bandwidth_bytes_per_s * _CHUNK_S)
        return self._config.sub_buffers * min(max(chunk_bytes, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)

    def _apply(self) -> None:
        """Tell whoever sends."""
        page, plan = self._slab.pace, self.plan
        if plan is None or not self.scheme.paced:
            page.set_pace(Pace.FREE)
            return
        newest = self._slab.newest_started()
        shard_bytes = newest.data_bytes if newest is not None else 0
        cut = chunking(self.scheme, shard_bytes, self._buffer_bytes(plan.link), self._config.sub_buffers)
        page.set_plan(
            [self._config.safety * mean_s for mean_s in plan.profile.means_s],
            bandwidth_bytes_per_s=plan.link.bandwidth_bytes_per_s,
            startup_s=plan.link.startup_s,
            chunk_bytes=cut.chunk_bytes,
            window_bytes=cut.window_bytes,
            one_chunk=cut.one_chunk,
            iteration_s=plan.profile.iteration_s,
        )
        page.set_pace(Pace.PACED)

    def _tell(self, slowest: dict[str, Any]) -> None:
        aim = self._config.checkpoint_every
        text = (
            f"an iteration of {slowest['iteration_s']:.3g} s leaves the network idle for {slowest['idle_s']:.3g} s, "
            f"a checkpoint takes {slowest['checkpoint_s']:.3g} s of it"
        )
        if self._every > aim:
            text += f": too little for one every {aim}; taking one every {self._every} iterations"
        fits = self._every == aim and slowest["overhead"] <= self._config.overhead_budget
        self._announce(text, {**slowest, "scheme": self.scheme.value, "every": self._every, "fits": fits})

    def _tell_unscheduled(self, rank: int) -> None:
        text = (
            f"checkpoints travel unscheduled: rank {rank} found no repeating pattern of idle spans, or could not "
            "measure its link"
        )
        self._announce(text, {"scheme": self.scheme.value, "every": self._every, "fits": None})

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


def _figures(plan: Plan) -> dict[str, Any]:
    sent = [chunk for span in plan.cadence.schedule.spans for chunk in span]
    size_bytes = sum(chunk.size_bytes for chunk in sent)
    return {
        "iteration_s": plan.profile.iteration_s,
        "idle_s": plan.profile.idle_s,
        "every": plan.cadence.every,
        "checkpoint_s": size_bytes / plan.link.bandwidth_bytes_per_s + len(sent) * plan.link.startup_s,
        "overhead": plan.cadence.overhead,
        "bandwidth_bytes_per_s": plan.link.bandwidth_bytes_per_s,
        "startup_s": plan.link.startup_s,
    }
