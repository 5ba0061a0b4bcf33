"""Draws what the interference experiment measured, after Figures 7, 8 and 16 of GEMINI (SOSP '23).

    python recipes/experiments/figures.py <run dir>     # draws <run dir>/result.json again

The times are of the experiment's small model on the experiment's links; the paper's are of 100B parameters on GPUs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from result_rows import BUDGET, Row, break_point, of_scheme, read_rows

_COLOURS = {
    "none": "#999999",
    "interleaved": "#228833",
    "unpipelined": "#ddaa33",
    "naive": "#ee7733",
    "eager": "#aa3377",
    "blocking": "#cc3311",
}
"""Every scheme, in the order of drawing."""

_OTHER_COLOUR = "#4477aa"
_IDLE_COLOUR = "#66ccee"
_BAR_PART = 0.8


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes every figure that the rows suffice for, as a PNG each.

    Args:
        rows: The ``rows`` of `result.json`.
        folder: Where the files go; it exists.

    Returns:
        The files written: a figure whose schemes were not measured is left out.

    Raises:
        UnreadableRowError: A row is not what the experiment writes.
    """
    read = read_rows(rows)
    figures: tuple[tuple[str, Callable[[list[Row]], Figure | None]], ...] = (
        ("figure_07_iteration_time.png", _iteration_time),
        ("figure_08_idle_time.png", _idle_time),
        ("figure_16_schemes.png", _schemes),
        ("break_point.png", _break_point),
    )
    written = []
    for name, drawn in figures:
        if figure := drawn(read):
            figure.savefig(folder / name, dpi=120)
            written.append(folder / name)
    return written


def main(folder: Path) -> None:
    """Draws the result of a finished run again."""
    for path in draw(json.loads((folder / "result.json").read_text())["rows"], folder):
        print(path)


def _iteration_time(rows: list[Row]) -> Figure | None:
    """After Figure 7: an iteration without checkpoints beside one with a checkpoint every iteration."""
    compared = [of_scheme(rows, scheme) for scheme in ("none", "interleaved")]
    if not all(compared):
        return None
    figure, axis = _page("Iteration time without checkpoints, and with one every iteration (after Figure 7)")
    speeds = _speeds([row for scheme in compared for row in scheme])
    for number, scheme in enumerate(compared):
        where = [speeds.index(row.link_mbit) + _beside(number, len(compared)) for row in scheme]
        _bars(axis, where, scheme, _BAR_PART / len(compared))
    _link_axis(axis, speeds, rows)
    axis.set_ylabel("iteration, seconds (median and spread)")
    _legend(figure)
    return figure


def _idle_time(rows: list[Row]) -> Figure | None:
    """After Figure 8: how long training leaves the network alone, and how long a checkpoint takes."""
    quantities = (
        ("idle time of an iteration", _IDLE_COLOUR, {r.link_mbit: r.idle_s for r in rows if r.idle_s is not None}),
        ("checkpoint, sent at once while training waits", _COLOURS["blocking"], _checkpoint_times(rows, "blocking")),
        ("checkpoint, in idle spans only", _COLOURS["interleaved"], _checkpoint_times(rows, "interleaved")),
    )
    drawn = [quantity for quantity in quantities if quantity[2]]
    if len(drawn) < 2:
        return None
    figure, axis = _page("Idle time of the network, and time of a checkpoint (after Figure 8)")
    speeds = sorted({speed for _, _, seconds in drawn for speed in seconds}, reverse=True)
    for number, (name, colour, seconds) in enumerate(drawn):
        where = [speeds.index(speed) + _beside(number, len(drawn)) for speed in seconds]
        bars = axis.bar(where, list(seconds.values()), _BAR_PART / len(drawn), color=colour, label=name)
        axis.bar_label(bars, fmt="{:.3g}", fontsize=8, padding=2)
    _link_axis(axis, speeds, rows)
    axis.set_ylabel("seconds (measured)")
    _legend(figure)
    return figure


def _schemes(rows: list[Row]) -> Figure | None:
    """After Figure 16: what every scheme makes of an iteration, a panel for each link speed."""
    speeds, schemes = _speeds(rows), _in_order(rows)
    figure = Figure(figsize=(3.4 * len(speeds) + 1.6, 4.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(speeds), squeeze=False)[0])
    for speed, axis in zip(speeds, panels, strict=True):
        here = [row for row in rows if row.link_mbit == speed]
        for row in here:
            _bars(axis, [schemes.index(row.scheme)], [row], _BAR_PART)
            label = "" if row.scheme == "none" else f"{100 * row.overhead:+.1f} %"
            axis.text(
                schemes.index(row.scheme), row.iteration_high_s, f" {label}", rotation=90, ha="center", fontsize=9
            )
        axis.set_ylim(0, 1.25 * max(row.iteration_high_s for row in here))
        axis.set_xticks(range(len(schemes)), schemes, rotation=45, ha="right")
        axis.set_title(f"{speed:g} Mbit/s{_fit(rows, speed)}", fontsize=10)
        _plain(axis)
    panels[0].set_ylabel("iteration, seconds (median and spread)")
    figure.suptitle("Iteration time of every scheme, and what it costs against none (after Figure 16)", fontsize=12)
    return figure


def _break_point(rows: list[Row]) -> Figure | None:
    """From which link speed on checkpoints are free, and what they cost below it."""
    schemes = [scheme for scheme in _in_order(rows) if scheme != "none"]
    if "interleaved" not in schemes:
        return None
    figure, axis = _page("Cost of a checkpoint every iteration, by link speed")
    for scheme in schemes:
        ordered = of_scheme(rows, scheme)
        speeds, parts = [row.link_mbit for row in ordered], [100 * row.overhead for row in ordered]
        width = 2.4 if scheme == "interleaved" else 1.2
        axis.plot(speeds, parts, "o-", color=_colour(scheme), linewidth=width, markersize=5, label=scheme)
        _draw_intervals(axis, ordered)
    axis.axhline(100 * BUDGET, color="black", linestyle=":", linewidth=1, label=f"budget {100 * BUDGET:g} %")
    if found := break_point(rows):
        axis.axvspan(found.beyond_mbit, found.within_mbit, color=_COLOURS["interleaved"], alpha=0.12, linewidth=0)
        note = f"break point: {found.beyond_mbit:g} to {found.within_mbit:g} Mbit/s"
        middle = math.sqrt(found.beyond_mbit * found.within_mbit)
        axis.text(middle, 0.98, note, transform=axis.get_xaxis_transform(), va="top", ha="center", fontsize=9)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1.0)
    axis.yaxis.set_major_formatter("{x:g} %")
    axis.set_xticks(_speeds(rows), [f"{speed:g}{_fit(rows, speed)}" for speed in _speeds(rows)])
    axis.minorticks_off()
    axis.set_xlabel("link, Mbit/s")
    axis.set_ylabel("iteration longer than without checkpoints\n(linear up to 1 %, then logarithmic)")
    _plain(axis)
    _legend(figure)
    return figure


def _page(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots()


def _bars(axis: Axes, where: Sequence[float], rows: Sequence[Row], width: float) -> None:
    """Bars of iteration times of one scheme, with their spread."""
    spread = np.array([(r.iteration_s - r.iteration_low_s, r.iteration_high_s - r.iteration_s) for r in rows]).T
    seconds, scheme = [row.iteration_s for row in rows], rows[0].scheme
    axis.bar(where, seconds, width, yerr=spread, capsize=3, ecolor="#333333", color=_colour(scheme), label=scheme)


def _draw_intervals(axis: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.overhead_low is not None and row.overhead_high is not None:
            ends = [100 * row.overhead_low, 100 * row.overhead_high]
            axis.plot([row.link_mbit] * 2, ends, color=_colour(row.scheme), linewidth=1, marker="_", alpha=0.8)


def _link_axis(axis: Axes, speeds: Sequence[float], rows: Sequence[Row]) -> None:
    axis.set_xticks(range(len(speeds)), [f"{speed:g}{_fit(rows, speed)}" for speed in speeds])
    axis.set_xlabel("link, Mbit/s")
    _plain(axis)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _fit(rows: Sequence[Row], speed: float) -> str:
    """A second line under a link speed, where the checkpoint does not fit the idle time."""
    return "" if all(row.fits for row in rows if row.link_mbit == speed) else "\n(does not fit)"


def _beside(number: int, of: int) -> float:
    """How far from the middle bar ``number`` of a cluster stands."""
    return (number - (of - 1) / 2) * _BAR_PART / of


def _checkpoint_times(rows: Sequence[Row], scheme: str) -> dict[float, float]:
    return {row.link_mbit: row.checkpoint_s for row in of_scheme(rows, scheme) if row.checkpoint_s is not None}


def _speeds(rows: Sequence[Row]) -> list[float]:
    return sorted({row.link_mbit for row in rows}, reverse=True)


def _in_order(rows: Sequence[Row]) -> list[str]:
    known = list(_COLOURS)
    found = {row.scheme for row in rows}
    return [scheme for scheme in known if scheme in found] + sorted(found - set(known))


def _colour(scheme: str) -> str:
    return _COLOURS.get(scheme, _OTHER_COLOUR)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
