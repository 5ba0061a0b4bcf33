"""How often to checkpoint when a checkpoint does not fit the idle time (GEMINI, SOSP '23, section 5).

A version may travel over several iterations: its bytes are read from the slab, where the version was copied to, and
not from the live state, which moves on. All spans of its first iterations serve it, and those up to the optimizer's
step of the last one: it must be committed by then, as the next version is taken after that step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gemini.core.schedule import Chunk, Packing, Schedule, check_spans
from lightning_gemini.errors import ConfigurationError

__all__ = ["Cadence", "choose_every"]


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often a version is taken, and what that is expected to cost.

    Attributes:
        every: Iterations from one version to the next.
        overhead: Part by which training gets slower: what does not fit the idle spans, over all ``every`` iterations.
            More than was asked for only where no cadence within the limit is cheap enough.
        schedule: Where the chunks travel. Span i of iteration j, both from 0, is at j x (spans of an iteration) + i;
            the last iteration ends with its span ``deadline``.
    """

    every: int
    overhead: float
    schedule: Schedule


def choose_every(
    profile_means_s: Sequence[float],
    deadline: int,
    iteration_s: float,
    checkpoint_bytes: int,
    *,
    budget: float,
    limit: int,
    replicas: int,
    bandwidth_bytes_per_s: float,
    startup_s: float,
    buffer_bytes: int,
    sub_buffers: int,
    safety: float,
) -> Cadence:
    """Chooses the smallest number of iterations per version whose overhead is within the budget.

    One walk over the iterations: what the first ones carry does not depend on how many follow.

    Args:
        profile_means_s: Mean length of every idle span of one iteration.
        deadline: Collectives issued before the optimizer's step: in its last iteration a version has the spans 0 to
            this one.
        iteration_s: Duration of an iteration without checkpoints.
        checkpoint_bytes: Bytes of one copy.
        budget: Part by which training may get slower, such as 0.01.
        limit: The most iterations per version; taken where none is within the budget.
        replicas: As in `schedule_chunks`, like all that follow.
        bandwidth_bytes_per_s: Speed of the link.
        startup_s: Time of every chunk beyond its bytes.
        buffer_bytes: What the receiver reserves.
        sub_buffers: Parts of that reserve.
        safety: Part of a span that is used.

    Raises:
        ConfigurationError: A number is impossible.
    """
    check_spans(profile_means_s)
    _check(profile_means_s, deadline, iteration_s, budget, limit)
    packing = Packing(
        checkpoint_bytes,
        replicas=replicas,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        startup_s=startup_s,
        buffer_bytes=buffer_bytes,
        sub_buffers=sub_buffers,
        safety=safety,
    )
    before, after = profile_means_s[:deadline], profile_means_s[deadline:]
    spans: list[tuple[Chunk, ...]] = []
    every = 1
    while True:
        spans += map(packing.fill, before)
        overrun_s = packing.overrun_s(profile_means_s[deadline])
        overhead = overrun_s / (every * iteration_s)
        if overhead <= budget or every == limit:
            return Cadence(every, overhead, Schedule((*spans, packing.rest()), overrun_s))
        spans += map(packing.fill, after)
        every += 1


def _check(profile_means_s: Sequence[float], deadline: int, iteration_s: float, budget: float, limit: int) -> None:
    if not 0 <= deadline < len(profile_means_s):
        raise ConfigurationError(
            f"deadline must be the number of one of the {len(profile_means_s)} idle spans, from 0, got {deadline}: "
            "use the deadline of the same profile"
        )
    if not (math.isfinite(iteration_s) and iteration_s > 0):
        raise ConfigurationError(f"iteration_s must be finite and above 0, got {iteration_s}: profile an iteration")
    if not (math.isfinite(budget) and budget >= 0):
        raise ConfigurationError(f"the overhead budget must be 0 or more, got {budget}: use 0.01 for one percent")
    if limit < 1:
        raise ConfigurationError(f"the limit must be 1 iteration per version or more, got {limit}")
