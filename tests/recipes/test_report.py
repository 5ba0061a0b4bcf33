from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import report
import timeline

from .written_run import START, WrittenRun, loss_at

PERSISTENT = dict.fromkeys(range(4), "persistent")


def interrupted(folder: Path) -> report.Run:
    run = WrittenRun(folder).train(8)
    run.fail("software", [1], 8, {}).train(16)
    run.fail("hardware", [2], 15, {2: "remote_memory"}).train(24)
    run.fail("hardware", [0, 1], 20, PERSISTENT).train(30)
    return report.read_run(folder)


def test_every_failure_is_followed_to_the_first_step_after_it(tmp_path: Path) -> None:
    found = report.faults(interrupted(tmp_path / "run"))
    assert [fault.kind for fault in found] == ["software", "hardware", "group"]
    software, hardware, group = (fault.record for fault in found)
    assert (software["at_step"], software["resumed_from_version"], software["lost_steps"]) == (8, 8, 0)
    assert software["tiers"] == {"local_memory": 4, "remote_memory": 0, "persistent": 0}
    assert hardware["tiers"] == {"local_memory": 3, "remote_memory": 1, "persistent": 0}
    assert hardware["tier_of_rank"] == ["local_memory", "local_memory", "remote_memory", "local_memory"]
    assert (hardware["lost_steps"], group["lost_steps"]) == (1, 4)
    assert group["tiers"] == {"local_memory": 0, "remote_memory": 0, "persistent": 4}
    assert group["killed_pids"] == [100, 101]
    assert (software["retrieve_s"], hardware["retrieve_s"]) == (0.0, 0.25)
    assert software["detect_s"] == pytest.approx(2.0)
    assert software["restart_s"] == pytest.approx(1.3)  # rank 3 is the last to begin
    assert software["restore_s"] == pytest.approx(0.5)
    assert software["total_s"] == pytest.approx(2.0 + 1.5 + 0.3 + 0.5)


def test_two_nodes_killed_by_two_injections_are_one_failure(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run").train(5)
    run.event("fault_injected", kind="hardware", node=3, pids=[7], signal="SIGKILL", at_step=4)
    run.fail("hardware", [2], 3, PERSISTENT).train(9)
    (fault,) = report.faults(report.read_run(tmp_path / "run"))
    assert (fault.kind, fault.nodes) == ("group", (2, 3))
    assert fault.record["at_step"] == 4


def test_losses_agree_bit_for_bit_with_an_undisturbed_run(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "run")
    WrittenRun(tmp_path / "reference").train(30)
    reference = report.read_run(tmp_path / "reference")
    assert report.differences(run, reference) == []
    assert report.losses(run)[2][6] == loss_at(7, 2)
    assert len(report.mean_losses(run)) == 30


def test_a_single_bit_in_a_step_trained_again_is_a_difference(tmp_path: Path) -> None:
    WrittenRun(tmp_path / "reference").train(30)
    interrupted(tmp_path / "run")
    path = tmp_path / "run" / "steps" / "rank2.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(line for line in lines if line["step"] == 22)  # trained again after the loss of the group
    first["loss"] = float(np.nextafter(first["loss"], 10.0))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, reference = report.read_run(tmp_path / "run"), report.read_run(tmp_path / "reference")
    (difference,) = report.differences(run, reference)
    assert difference.startswith("rank 2 step 22")


def test_a_run_of_another_length_differs(tmp_path: Path) -> None:
    WrittenRun(tmp_path / "a").train(30)
    WrittenRun(tmp_path / "b").train(29)
    a, b = report.read_run(tmp_path / "a"), report.read_run(tmp_path / "b")
    assert report.differences(a, b)
    assert report.differences(b, a)


def test_a_missing_step_or_a_missing_restore_is_an_error(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run").train(5)
    run.step = 6
    run.train(8)
    with pytest.raises(report.IncompleteRunError, match="lacks steps"):
        report.losses(report.read_run(tmp_path / "run"))
    run.fail("software", [0], 8, {})
    with pytest.raises(report.IncompleteRunError, match="no step afterwards"):
        report.faults(report.read_run(tmp_path / "run"))


def test_an_unnoticed_failure_is_an_error(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run").train(5)
    run.event("fault_injected", kind="software", node=0, pids=[7], signal="SIGKILL", at_step=5)
    with pytest.raises(report.IncompleteRunError, match="never noticed"):
        report.faults(report.read_run(tmp_path / "run"))


def test_checkpoint_cost_is_taken_from_what_was_stored(tmp_path: Path) -> None:
    WrittenRun(tmp_path / "with").train(9)
    WrittenRun(tmp_path / "without").train(9, checkpoints=False)
    run, without = report.read_run(tmp_path / "with"), report.read_run(tmp_path / "without")
    cost = report.checkpoint_cost(run, without)
    assert cost["bytes_per_rank"] == 4096
    assert cost["stall_s_median"] == pytest.approx(0.005)
    assert (cost["versions"], cost["versions_skipped"]) == (36, 0)
    assert cost["iteration_s_median"] == pytest.approx(0.5)
    with pytest.raises(report.IncompleteRunError, match="no rank stored"):
        report.checkpoint_cost(without, run)


def test_throughput_is_zero_from_the_kill_to_the_next_step(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "run")
    found = report.faults(run)
    times = np.array([START + 2.25, found[0].time + 1.0, found[0].resumed - 0.01, found[0].resumed + 0.25])
    assert timeline.throughput(run, 1, found, times).tolist() == pytest.approx([200.0, 0.0, 0.0, 200.0])


def test_the_timeline_is_a_picture(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "run")
    timeline.draw(run, report.faults(run), tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
