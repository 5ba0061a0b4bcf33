"""The numbers of a soak: faults by kind, recoveries by tier, lost steps, and how long everything took."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from invariants import Recovery, recoveries
from report import Record, Run

STAGES = ("detect", "restart", "restore", "total")
CLOCK_SLACK_S = 0.2
"""A failure may be seen before its injector has written down that it killed."""


def summarise(run: Run) -> dict[str, Any]:
    """Counts and times of one run.

    Args:
        run: The run, with faults.

    Returns:
        ``faults`` and ``missed`` by kind, ``recoveries`` by the farthest tier a rank needed, ``generations``,
        ``steps`` (trained by rank 0, repeated ones included), ``lost_steps`` of all recoveries and the most of one, and
        ``seconds_of`` each stage: median and worst.
    """
    done = [event for event in run.events if event["event"] == "fault_injected"]
    found = [event for event in recoveries(run) if len(event.tiers) == len(run.steps)]
    everyone = recoveries(run)
    stages = [stage for stage in (_stages(run, event, everyone) for event in found) if stage is not None]
    lost = [_lost_steps(run, event) for event in found]
    return {
        "faults": dict(Counter(event["kind"] for event in done)),
        "missed": dict(Counter(event["kind"] for event in run.events if event["event"] == "fault_missed")),
        "recoveries": dict(Counter(event.tier for event in found)),
        "generations": sum(event["event"] == "generation_started" for event in run.events),
        "steps": len(run.steps[0]),
        "last_step": max(record["step"] for record in run.steps[0]),
        "lost_steps": {"sum": sum(lost), "worst": max(lost, default=0)},
        "seconds_of": {name: _spread([stage[name] for stage in stages]) for name in STAGES if stages},
    }


def text(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(summary["faults"].items()))
    tiers = ", ".join(f"{count} {tier.replace('_', ' ')}" for tier, count in sorted(summary["recoveries"].items()))
    times = "; ".join(
        f"{name} {spread['median']:.1f} s (worst {spread['worst']:.1f})"
        for name, spread in summary["seconds_of"].items()
    )
    lost = summary["lost_steps"]
    return "\n".join(
        [
            f"faults: {sum(summary['faults'].values())} ({faults}); missed: {sum(summary['missed'].values())}",
            f"recoveries: {sum(summary['recoveries'].values())} ({tiers})",
            f"steps: {summary['last_step']}; lost in all recoveries {lost['sum']}, in one at most {lost['worst']}",
            f"median times: {times}",
            f"invariants broken: {len(summary['violations'])}; {summary['seconds']:.0f} s",
        ]
    )


def _stages(run: Run, event: Recovery, everyone: Sequence[Recovery]) -> dict[str, float] | None:
    """Where the time of a recovery went, from the fault that led to it; None if that cannot be told."""
    before = max((other.ended for other in everyone if other.ended < event.began), default=0.0)
    window = [other for other in run.events if before <= other["time"] <= event.ended]
    detected = min((other["time"] for other in window if other["event"] == "failure_detected"), default=None)
    resumed = [_first_step(records, event.generation) for records in run.steps.values()]
    fault = None if detected is None else _cause(window, detected)
    if detected is None or fault is None or None in resumed:
        return None
    return {
        "detect": max(0.0, detected - fault),
        "restart": event.began - detected,
        "restore": event.ended - event.began,
        "total": max(time for time in resumed if time is not None) - fault,
    }


def _cause(window: Sequence[Record], detected: float) -> float | None:
    """When the last fault before a detection was done, preferably one that kills processes of the job."""
    faults = [
        event for event in window if event["event"] == "fault_injected" and event["time"] <= detected + CLOCK_SLACK_S
    ]
    deadly = [event["time"] for event in faults if event["signal"] == "SIGKILL" and event["kind"] != "etcd"]
    return max(deadly or [event["time"] for event in faults], default=None)


def _first_step(records: Sequence[Record], generation: int) -> float | None:
    return next((record["time"] for record in records if record["generation"] == generation), None)


def _lost_steps(run: Run, event: Recovery) -> int:
    """Steps that every rank had completed when the generation before ended, and must train again."""
    completed = []
    for records in run.steps.values():
        earlier = [record for record in records if record["generation"] < event.generation]
        completed.append(earlier[-1]["step"] if earlier else 0)
    return max(0, min(completed) - (event.version or 0))


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 3), "worst": round(max(seconds), 3)}
