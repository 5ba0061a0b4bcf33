"""A picture of a run with failures: throughput of every node over time, what was killed, and how training came back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from report import TIERS, Fault, Record, Run

_GRID_S = 0.1
_NODE_COLOUR = "#4477aa"
_KILL_COLOUR = "#cc3311"
_PHASES = (
    ("not yet noticed", "#cc3311", 0.30),
    ("processes start", "#ddaa33", 0.30),
    ("state restored", "#228833", 0.60),
    ("first step", "#66ccee", 0.45),
)
_TIER_NAMES = dict(zip(TIERS, ("local memory", "a peer's memory", "persistent tier"), strict=True))


def draw(run: Run, faults: Sequence[Fault], path: Path) -> None:
    """Writes the picture as a PNG.

    Args:
        run: The run with failures.
        faults: Its failures, from ``report.faults``.
        path: The file to write.
    """
    nodes = sorted({record["node"] for records in run.steps.values() for record in records})
    start, end = _span(run)
    figure = Figure(figsize=(13, 2.2 + 1.25 * len(nodes) + 2.0), layout="constrained")
    heights = [1.0] * len(nodes) + [1.7]
    axes: list[Axes] = list(figure.subplots(len(nodes) + 1, 1, sharex=True, height_ratios=heights))
    for node, axis in zip(nodes, axes, strict=False):
        _draw_throughput(axis, run, node, faults, (start, end))
    _draw_steps(axes[-1], run, start)
    for axis in axes:
        _draw_phases(axis, faults, start)
    for fault in faults:
        _label(axes[0], fault, start)
    axes[-1].set_xlabel("seconds since the job started")
    axes[-1].set_xlim(0, end - start)
    figure.suptitle("GPT-2 under DeepSpeed ZeRO: throughput of every node while SIGKILL hits", fontsize=13)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=len(_PHASES) + 3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def throughput(run: Run, node: int, faults: Sequence[Fault], grid: np.ndarray) -> np.ndarray:
    """Tokens a second of one node at the times of ``grid`` (unix seconds): 0 in every interval that a failure cut."""
    rate = np.zeros(len(grid))
    killed = [fault.time for fault in faults]
    for records in run.steps.values():
        mine = [record for record in records if record["node"] == node]
        for before, after in itertools.pairwise(mine):
            if not any(before["time"] <= time < after["time"] for time in killed):
                inside = (grid > before["time"]) & (grid <= after["time"])
                rate[inside] += _tokens(after) / max(after["time"] - before["time"], 1e-6)
    return rate


def _span(run: Run) -> tuple[float, float]:
    """First and last moment of the run, unix seconds."""
    times = [record["time"] for records in (run.events, *run.steps.values()) for record in records]
    return min(times), max(times)


def _tokens(record: Record) -> int:
    return int(record.get("tokens", 1))


def _draw_throughput(axis: Axes, run: Run, node: int, faults: Sequence[Fault], span: tuple[float, float]) -> None:
    start, end = span
    grid = np.arange(start, end, _GRID_S)
    rate = throughput(run, node, faults, grid)
    axis.fill_between(grid - start, rate, step="mid", color=_NODE_COLOUR, alpha=0.35, linewidth=0)
    axis.step(grid - start, rate, where="mid", color=_NODE_COLOUR, linewidth=0.9)
    axis.set_ylim(0, 1.25 * max(float(np.percentile(rate, 99)), 1.0))
    axis.set_ylabel(f"node {node}\ntokens/s")
    for fault in faults:
        if node in fault.nodes:
            axis.plot(fault.time - start, 0, "X", color=_KILL_COLOUR, markersize=11, clip_on=False, zorder=5)


def _draw_steps(axis: Axes, run: Run, start: float) -> None:
    for records in run.steps.values():
        times = [record["time"] - start for record in records]
        axis.plot(times, [record["step"] for record in records], ".", color=_NODE_COLOUR, markersize=3.5)
    axis.set_ylabel("optimizer step\nof every rank")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)


def _draw_phases(axis: Axes, faults: Sequence[Fault], start: float) -> None:
    for fault in faults:
        moments = (fault.time, fault.detected, fault.restore_began, fault.restore_ended, fault.resumed)
        for (_, colour, alpha), begin, end in zip(_PHASES, moments, moments[1:], strict=False):
            axis.axvspan(begin - start, max(end, begin) - start, color=colour, alpha=alpha, linewidth=0)
        axis.axvline(fault.time - start, color=_KILL_COLOUR, linewidth=1.1)


def _label(axis: Axes, fault: Fault, start: float) -> None:
    victim = {"software": "worker of node", "hardware": "node"}.get(fault.kind, "group of nodes")
    tiers = [f"{count} × {_TIER_NAMES[tier]}" for tier, count in fault.record["tiers"].items() if count]
    lines = (
        f"{victim} {', '.join(map(str, fault.nodes))} killed",
        f"at step {fault.record['at_step']}; on from step {fault.version}",
        f"after {fault.record['total_s']:.1f} s; restored from",
        *tiers,
    )
    axis.annotate(
        "\n".join(lines),
        xy=(fault.time - start, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 6),
        textcoords="offset points",
        fontsize=8.5,
        va="bottom",
        color=_KILL_COLOUR,
    )


def _legend() -> list[Patch | Line2D]:
    phases: list[Patch | Line2D] = [Patch(color=colour, alpha=alpha, label=name) for name, colour, alpha in _PHASES]
    killed = Line2D([], [], color=_KILL_COLOUR, marker="X", linestyle="", markersize=10, label="SIGKILL")
    return [Patch(color=_NODE_COLOUR, alpha=0.35, label="training"), killed, *phases]
