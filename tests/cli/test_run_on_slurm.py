"""A job whose machines are jobs of a real Slurm: trained, hit from outside, recovered, and gone at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.scripts import UNTIL_FILE
from tests.controlplane.slurm_cluster import SlurmCluster, slurm  # noqa: F401 a fixture

pytestmark = pytest.mark.timeout(120)


def test_a_cancelled_machine_is_replaced(
    slurm: SlurmCluster,  # noqa: F811
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    def machines() -> set[str]:
        return set(slurm.command("squeue", "-h", "-t", "PD,R", "-o", "%j").stdout.split())

    run = start(UNTIL_FILE, str(tmp_path / "enough"), operator="slurm,poll_s=0.2")
    run.until_running(1)
    assert len(before := machines()) == 2
    (node,) = [event for event in run.events("member_joined") if event["node"] == 1]
    assert node["name"] in before
    assert slurm.command("scancel", f"--name={node['name']}").returncode == 0
    run.until_running(2)
    assert node["name"] not in machines()
    (tmp_path / "enough").touch()
    assert run.wait() == 0, run.output.read_text()
    (failure,) = run.events("failure_detected")
    assert (failure["kind"], failure["nodes_lost"]) == ("hardware", [1])
    assert not machines(), "the end of the job is the end of its machines"
