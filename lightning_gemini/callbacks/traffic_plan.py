"""What one rank makes of its profile: how often a version fits the network's idle spans, and how it is cut."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_gemini.config import P2P_BUFFER_BYTES, CheckpointConfig
from lightning_gemini.core.frequency import Cadence, choose_every
from lightning_gemini.core.idle_spans import IdleProfile
from lightning_gemini.core.scheme import Chunking, Scheme, chunking
from lightning_gemini.dataplane.link_speed import LinkSpeed
from lightning_gemini.dataplane.pace_page import Pace, PacePage
from lightning_gemini.errors import GeminiError

__all__ = ["Plan", "Planner", "figures", "sentence"]

log = logging.getLogger(__name__)

_MOST_ITERATIONS = 1000
_CHUNK_S = 0.008
_HALVINGS, _SLACK = 5, 1.25  # spans differ from one iteration to the next
_LEAST_PART = 0.4  # a sender must find what may be used of a span
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 16 << 10, 32 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """For one rank.

    Attributes:
        profile: Its idle spans.
        cadence: How often a version fits.
        chunking: How it is cut.
        link: How fast it travels.
        shard_bytes: How large it is.
        safety: Part of every idle span that is used.
    """

    profile: IdleProfile
    cadence: Cadence
    chunking: Chunking
    link: LinkSpeed
    shard_bytes: int
    safety: float


class Planner:
    """Makes plans, and tells them to whoever sends.

    Args:
        config: The strategy's settings.
        replicas: Copies of every shard, the owner's own included.
    """

    def __init__(self, config: CheckpointConfig, replicas: int) -> None:
        self._config, self._replicas = config, replicas

    def plan(self, scheme: Scheme, profile: IdleProfile, link: LinkSpeed, shard_bytes: int) -> Plan | None:
        """A plan for one of the paced schemes; ``None``, and a warning, where none can be made."""
        cut = self._cut(scheme, link, shard_bytes)

        def planned(safety: float, limit: int) -> Plan:
            cadence = choose_every(
                profile.means_s,
                profile.deadline,
                profile.iteration_s,
                shard_bytes,
                budget=self._config.overhead_budget,
                limit=limit,
                replicas=self._replicas,
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
                startup_s=link.startup_s,
                buffer_bytes=cut.window_bytes,
                sub_buffers=cut.sub_buffers,
                safety=safety,
            )
            return Plan(profile, cadence, cut, link, shard_bytes, safety)

        try:
            return _sparing(planned, self._config.safety)
        except GeminiError as error:
            log.warning("cannot schedule checkpoint traffic: %s", error)
            return None

    def apply(self, page: PacePage, scheme: Scheme, plan: Plan | None) -> None:
        """Tell whoever sends what to do from now on; without a plan everything goes at once."""
        if plan is None or not scheme.paced:
            page.set_pace(Pace.FREE)
            return
        cut = self._cut(scheme, plan.link, plan.shard_bytes)
        page.set_plan(
            [plan.safety * mean_s for mean_s in plan.profile.means_s],
            bandwidth_bytes_per_s=plan.link.bandwidth_bytes_per_s,
            startup_s=plan.link.startup_s,
            chunk_bytes=cut.chunk_bytes,
            window_bytes=cut.window_bytes,
            one_chunk=cut.one_chunk,
            iteration_s=plan.profile.iteration_s,
            lead=(1 / plan.safety - 1) / 2,  # what is not used lies half before and half behind
            periods_s=plan.profile.periods_s,
        )
        page.set_pace(Pace.PACED)

    def _cut(self, scheme: Scheme, link: LinkSpeed, shard_bytes: int) -> Chunking:
        return chunking(scheme, shard_bytes, self._buffer_bytes(link), self._config.sub_buffers)

    def _buffer_bytes(self, link: LinkSpeed) -> int:
        if self._config.buffer_bytes is not None:
            return self._config.buffer_bytes
        if self._config.transport == "p2p":
            return P2P_BUFFER_BYTES
        chunk_bytes = int(link.bandwidth_bytes_per_s * _CHUNK_S)
        return self._config.sub_buffers * min(max(chunk_bytes, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)


def _sparing(planned: Callable[[float, int], Plan], most: float) -> Plan:
    """The plan that uses ``most`` of every span; or one that fits as well in less of it, in the middle of all spans.

    Collectives do not begin and end at the same moment on all ranks, so the middle is where nobody is disturbed.
    """
    best, low = planned(most, _MOST_ITERATIONS), min(most, _LEAST_PART) / _SLACK
    if best.cadence.overhead > 0.0:
        return best
    every, high = best.cadence.every, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = planned(middle, every).cadence
        low, high = (middle, high) if found.overhead > 0.0 else (low, middle)
    spared = planned(min(most, high * _SLACK), every)
    return best if spared.cadence.overhead > 0.0 else spared


def figures(plan: Plan) -> dict[str, Any]:
    """A plan's numbers, for other ranks and for the event log; seconds, bytes a second, and fractions."""
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


def sentence(slowest: dict[str, Any], every: int, aim: int) -> str:
    """What was decided, in words.

    Args:
        slowest: The figures of the rank that decides.
        every: Iterations from version to version.
        aim: What the user asked for.
    """
    text = (
        f"an iteration of {slowest['iteration_s']:.3g} s leaves the network idle for {slowest['idle_s']:.3g} s, "
        f"a checkpoint takes {slowest['checkpoint_s']:.3g} s of it"
    )
    return text if every <= aim else f"{text}: too little for one every {aim}; taking one every {every} iterations"
