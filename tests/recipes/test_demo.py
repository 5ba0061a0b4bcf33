from __future__ import annotations

import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import demo
import pytest
import settings
import verdict
from progress import Progress, Screen

from .written_run import WrittenRun

CFG = settings.settings(demo.EXPERIMENT)


def test_failures_are_drawn_from_the_seed_alone() -> None:
    assert demo.planned_faults(CFG, 5) == demo.planned_faults(CFG, 5)
    assert len({tuple(demo.planned_faults(CFG, seed)) for seed in range(20)}) > 10


def test_every_seed_gives_room_before_between_and_after_failures() -> None:
    for seed in range(200):
        planned = demo.planned_faults(CFG, seed)
        assert [failure.kind for failure in planned] == ["software", "hardware", "group"]
        steps = [failure.at_step for failure in planned]
        assert steps[0] >= 4
        assert CFG.trainer.max_steps - steps[-1] >= 4
        assert min(b - a for a, b in itertools.pairwise(steps)) >= 6
        assert planned[2].victims in ((0, 1), (2, 3))


def report(**changes: Any) -> dict[str, Any]:
    """A report as it should be, except for what is changed in its hardware failure."""
    failure = {
        "kind": "hardware",
        "nodes": [2],
        "at_step": 9,
        "resumed_from_version": 8,
        "lost_steps": 1,
        "tiers": {"local_memory": 3, "remote_memory": 1, "persistent": 0},
        **dict.fromkeys(("detect_s", "retrieve_s", "restart_s", "restore_s", "total_s"), 0.5),
    }
    failure.update(changes)
    return {
        "nodes": 4,
        "world_size": 4,
        "failures": [failure],
        "loss": {"bit_identical": True, "differences": []},
    }


def test_a_good_report_has_no_problems() -> None:
    assert verdict.problems(report()) == []
    group = {"kind": "group", "nodes": [0, 1], "lost_steps": 7}
    everyone = {"local_memory": 0, "remote_memory": 0, "persistent": 4}
    assert verdict.problems(report(**group, tiers=everyone)) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lost_steps": 3}, "3 steps lost"),
        ({"tiers": {"local_memory": 4, "remote_memory": 0, "persistent": 0}}, "expected"),
        ({"kind": "software"}, "expected"),
        ({"kind": "group", "nodes": [0, 1]}, "expected"),
    ],
)
def test_what_must_not_be_is_a_problem(changes: dict[str, Any], problem: str) -> None:
    (found,) = verdict.problems(report(**changes))
    assert problem in found


def test_losses_that_differ_are_a_problem() -> None:
    wrong = report()
    wrong["loss"] = {"bit_identical": False, "differences": ["rank 0 step 3"]}
    assert verdict.problems(wrong) == ["losses differ: rank 0 step 3"]


def test_the_table_says_where_each_recovery_came_from() -> None:
    assert "3 local memory, 1 remote memory" in verdict.table(report())


def test_progress_tells_what_happens(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.train(8).fail("hardware", [2], 8, {2: "remote_memory"})
    progress = Progress(tmp_path / "run", 20)
    lines = list(progress.update())
    assert progress.step == 8
    assert "step   8/20" in progress.line()
    assert any("SIGKILL to node 2 at step 8 (pids [102])" in line for line in lines)
    assert any("2.00 s later" in line for line in lines)
    assert any("back at version 8" in line and "1 from remote memory" in line for line in lines)
    assert list(progress.update()) == []


def test_progress_of_a_run_that_is_not_there_yet(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "none", 20)
    assert list(progress.update()) == []
    assert progress.line().startswith("starting")


def test_a_file_gets_whole_lines_only() -> None:
    out = io.StringIO()
    screen = Screen("1 of 3", out)
    screen.show("one")
    screen.show("two")
    screen.say("event")
    assert out.getvalue() == "[1 of 3] one\n[1 of 3] event\n"


def test_a_terminal_rewrites_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    screen = Screen("1 of 3", out)
    screen.show("a line too long for this terminal")
    screen.say("event that stays, whatever its length")
    clear = "\r\x1b[K"
    assert out.getvalue() == f"{clear}[1 of 3] a line too{clear}[1 of 3] event that stays, whatever its length\n"


def test_a_run_that_fails_shows_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--dir", str(tmp_path / "demo"), "gemini.operator.nodes=2", "model=none_such"]) == 1
    assert "none_such" in capsys.readouterr().err


def test_the_directory_of_a_live_job_is_left_alone(tmp_path: Path) -> None:
    from lightning_gemini.controlplane.processes import start_time

    job = {"job": "j", "launcher_pid": os.getpid(), "launcher_start_time": start_time(os.getpid())}
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(demo.DemoError, match="a live job uses"):
        demo._clear(tmp_path)
    assert (tmp_path / "job.json").exists()
