from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figures
import matplotlib.image
import numpy as np
import pytest
import result_rows

ALL = ["figure_07_iteration_time.png", "figure_08_idle_time.png", "figure_16_schemes.png", "break_point.png"]
SCHEMES = {"none": 0.0, "interleaved": 0.004, "unpipelined": 0.03, "naive": 0.02, "eager": 0.2, "blocking": 0.3}


def row(scheme: str, link_mbit: float, overhead: float) -> dict[str, Any]:
    return {
        "scheme": scheme,
        "link_mbit": link_mbit,
        "fits": link_mbit >= 100,
        "iterations": 50,
        "iteration_s_median": 0.8 * (1 + overhead),
        "iteration_s_low": 0.78 * (1 + overhead),
        "iteration_s_high": 0.85 * (1 + overhead),
        "overhead": overhead,
        "idle_s": 0.5 if scheme == "none" else None,
        "checkpoint_s": None if scheme == "none" else 50 / link_mbit,
        "peak_buffer_bytes": 0 if scheme == "none" else 2**20,
    }


def rows(*schemes: str) -> list[dict[str, Any]]:
    """An experiment at three speeds; at the slowest the checkpoint does not fit."""
    return [
        row(scheme, speed, SCHEMES[scheme] * (100 if speed < 100 and scheme == "interleaved" else 1))
        for speed in (50, 400, 200)
        for scheme in schemes or SCHEMES
    ]


def names(paths: list[Path]) -> list[str]:
    assert all(ink(path) > 0.01 for path in paths)
    return [path.name for path in paths]


def ink(path: Path) -> float:
    """Part of a picture that is not white."""
    return float(np.mean(np.any(matplotlib.image.imread(path)[..., :3] < 0.99, axis=-1)))


def has_colour(path: Path, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool(np.any(np.all(np.abs(matplotlib.image.imread(path)[..., :3] - wanted) < 0.01, axis=-1)))


def test_a_whole_experiment_gives_every_figure(tmp_path: Path) -> None:
    paths = figures.draw(rows(), tmp_path)
    assert names(paths) == ALL
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    schemes = tmp_path / "figure_16_schemes.png"
    assert all(has_colour(schemes, figures._COLOURS[scheme]) for scheme in SCHEMES)


@pytest.mark.parametrize(
    ("schemes", "drawn"),
    [
        (("none", "eager"), [ALL[2]]),
        (("none", "blocking"), [ALL[1], ALL[2]]),
        (("interleaved", "blocking"), [ALL[1], ALL[2], ALL[3]]),
    ],
)
def test_figures_of_schemes_that_were_not_measured_are_left_out(
    tmp_path: Path, schemes: tuple[str, ...], drawn: list[str]
) -> None:
    assert names(figures.draw(rows(*schemes), tmp_path)) == drawn


def test_a_scheme_missing_at_one_speed_and_a_single_speed(tmp_path: Path) -> None:
    some = [r for r in rows("none", "interleaved") if (r["scheme"], r["link_mbit"]) != ("none", 50)]
    assert names(figures.draw(some, tmp_path)) == ALL
    assert names(figures.draw([r for r in some if r["link_mbit"] == 400], tmp_path)) == ALL


def test_confidence_intervals_and_unknown_schemes_are_drawn(tmp_path: Path) -> None:
    more = [{**r, "overhead_low": r["overhead"] - 0.01, "overhead_high": r["overhead"] + 0.02} for r in rows()]
    assert names(figures.draw([*more, row("mine", 400, 0.1)], tmp_path)) == ALL
    assert has_colour(tmp_path / ALL[2], figures._OTHER_COLOUR)


def test_a_finished_run_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"experiment": "interference", "rows": rows()}))
    figures.main(tmp_path)
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ALL]


@pytest.mark.parametrize(
    ("overheads", "expected"),
    [
        ({400: 0.002, 200: -0.001, 100: 0.01, 50: 0.2}, (100, 50)),
        ({50: 0.2, 400: 0.002, 200: 0.03, 100: 0.004}, (400, 200)),
        ({400: 0.002, 200: 0.003}, None),
        ({400: 0.02, 200: 0.003}, None),
        ({}, None),
    ],
)
def test_the_break_point_lies_below_the_last_speed_within_budget(
    overheads: dict[int, float], expected: tuple[int, int] | None
) -> None:
    read = result_rows.read_rows([row("none", 400, 0.0), *(row("interleaved", s, o) for s, o in overheads.items())])
    found = result_rows.break_point(read)
    assert (found and (found.within_mbit, found.beyond_mbit)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"iteration_s_median": None},
            r"row 1 \('naive' at 400 Mbit/s\): expected a number above 0 as 'iteration_s_me",
        ),
        ({"iteration_s_median": float("nan")}, "found nan: mend"),
        ({"iteration_s_high": "0.9"}, "expected a number above 0 as 'iteration_s_high', found '0.9'"),
        ({"iteration_s_low": 0.9}, "expected iteration_s_low <= iteration_s_median"),
        ({"link_mbit": 0}, "as 'link_mbit', found 0"),
        ({"overhead": True}, "as 'overhead', found True"),
        ({"overhead_low": "x"}, "expected a finite number as 'overhead_low', found 'x'"),
        ({"fits": 1}, "expected true or false as 'fits', found 1"),
        ({"scheme": None}, "expected a text as 'scheme', found None"),
        ({"scheme": "none"}, "found two of 'none' at 400 Mbit/s"),
    ],
)
def test_wrong_rows_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(result_rows.UnreadableRowError, match=message):
        figures.draw([row("none", 400, 0.0), {**row("naive", 400, 0.1), **change}], tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_fields_and_no_rows_are_refused(tmp_path: Path) -> None:
    lacking = row("none", 400, 0.0)
    del lacking["fits"]
    with pytest.raises(result_rows.UnreadableRowError, match="as 'fits', found nothing"):
        figures.draw([lacking], tmp_path)
    with pytest.raises(result_rows.UnreadableRowError, match="found none: run the experiment"):
        figures.draw([], tmp_path)
