"""Faults done to running clusters from the command line, and from a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.controlplane.faults.driver import FaultDriver
from lightning_gemini.controlplane.processes import start_time
from lightning_gemini.core.failure_model import TraceModel
from lightning_gemini.core.fault import PlannedFault
from lightning_gemini.core.fault_trace import parse_trace
from tests.cli.conftest import COMMAND, Run
from tests.cli.scripts import UNTIL_FILE, WRITER

Start = Callable[..., Run]


def state(pid: int) -> str:
    """The kernel's letter for what a process does; T: stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def status(run: Run) -> list[dict[str, Any] | None]:
    nodes: list[dict[str, Any] | None] = json.loads(run.call("status", "--json").stdout)["status"]
    return nodes


def writing(run: Run) -> bool:
    """Every machine holds complete versions of both ranks."""
    nodes = status(run)
    return all(node and sum(holding["complete"] for holding in node["holdings"]) >= 3 for node in nodes)


@pytest.fixture
def cluster(start: Start, tmp_path: Path) -> Run:
    run = start(WRITER, str(tmp_path / "enough"), nodes=2)
    run.until_running()
    run.until(lambda: writing(run))
    return run


def finish(run: Run, tmp_path: Path) -> None:
    (tmp_path / "enough").touch()
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()


def injected(run: Run, *words: str) -> dict[str, Any]:
    done = run.call("inject", "--run-dir", str(run.path), *words)
    assert done.returncode == 0, done.stderr
    event: dict[str, Any] = json.loads(done.stdout)
    assert event in run.events("fault_injected")
    return event


def test_a_pause_a_cut_a_flip_and_a_dead_etcd_do_not_hurt_the_workers(cluster: Run, tmp_path: Path) -> None:
    agents = {node["machine"]: node["pid"] for node in status(cluster) if node}
    paused = injected(cluster, "--kind", "pause", "--node", "1", "--seconds", "0.3")
    assert (paused["pids"], paused["signal"], paused["seconds"]) == ([agents[1]], "SIGSTOP", 0.3)
    assert state(agents[1]) != "T"
    cut = injected(cluster, "--kind", "link", "--node", "0", "--seconds", "0.2")
    assert cut["connections"] >= 1
    flip = injected(cluster, "--kind", "corrupt", "--node", "0")
    assert flip["pids"] == [agents[0]]
    assert 0 <= flip["offset"] < 5000
    assert flip["owner"] in (0, 1)
    member = injected(cluster, "--kind", "etcd")
    pids = cluster.path / "etcd" / "pids.json"
    cluster.until(lambda: (now := json.loads(pids.read_text())) and now != member["pids"])
    assert start_time(member["pids"][0]) is None
    finish(cluster, tmp_path)
    assert not cluster.events("failure_detected")


def test_a_stopped_agent_goes_on_when_its_injector_is_told_to_end(cluster: Run, tmp_path: Path) -> None:
    agent = next(node["pid"] for node in status(cluster) if node and node["machine"] == 1)
    words = ["inject", "--run-dir", str(cluster.path), "--kind", "pause", "--node", "1", "--seconds", "100"]
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen([*COMMAND, *words], env=cluster.env) as pause:
            cluster.until(lambda: state(agent) == "T")
            pause.send_signal(number)
            assert pause.wait(10) == 128 + number
        assert state(agent) != "T"
    finish(cluster, tmp_path)


def test_a_trace_is_driven_against_the_job(cluster: Run, tmp_path: Path) -> None:
    trace = tmp_path / "faults.txt"
    trace.write_text("0.2 pause 0 for=0.3\ncalm=0.1 software 1\ncalm=0.1 root *\nnow software 7\n")
    root = next(node["root"] for node in status(cluster) if node)
    refused = cluster.call("inject", "--run-dir", str(cluster.path), "--model", f"trace,file={trace}")
    assert refused.returncode == 2
    assert "victims 0 to 1" in refused.stderr
    assert [event["kind"] for event in cluster.events("fault_injected")] == ["pause", "software", "root"]
    killed = cluster.events("fault_injected")[-1]
    assert killed["nodes"] == [root]
    assert len(killed["pids"]) >= 2
    written = cluster.path / "faults.trace"
    assert parse_trace(written.read_text())[1:] == (
        PlannedFault("software", (1,), calm_s=0.1),
        PlannedFault("root", calm_s=0.1),
    )
    (summary,) = cluster.events("faults_summary")
    assert summary["injected"] == {"pause": 1, "software": 1, "root": 1}
    cluster.until(lambda: len(cluster.events("generation_started")) == 3)
    finish(cluster, tmp_path)


def test_a_run_brings_its_own_faults(start: Start, tmp_path: Path) -> None:
    run = start(WRITER, str(tmp_path / "enough"), nodes=2, failure="software,stretch=120,repeat=2,seed=3")
    run.until(lambda: len(run.events("generation_started")) == 3, timeout_s=60)
    finish(run, tmp_path)
    steps = [fault["at_step"] for fault in run.events("fault_injected")]
    assert 30 <= steps[0] < 240 <= steps[1] + 120
    assert "faults: 2 software" in run.output.read_text()


def test_a_run_refuses_faults_that_it_has_nothing_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_gemini.cli import main

    script = tmp_path / "script.py"
    script.touch()
    assert main(["run", "--run-dir", str(tmp_path / "run"), "--failure", "correlated", str(script)]) == 2
    assert "give `run --domains`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_faults_without_a_victim_are_counted(start: Start, tmp_path: Path) -> None:
    run = start(UNTIL_FILE, str(tmp_path / "enough"), nodes=1)
    run.until_running(workers=1)
    model = TraceModel(parse_trace("0 link 0\n0 corrupt 0\n0.1 etcd 0\n"))
    driver = FaultDriver(run.path, model, seed=1)
    driver.start()
    try:
        # This script never says how many replicas it wants, so the driver goes on without that.
        run.until(lambda: run.events("faults_summary"))
    finally:
        counts = driver.close()
    assert counts.missed == {"link": 1, "corrupt": 1}
    assert counts.injected == {"etcd": 1}
    reasons = [event["reason"] for event in run.events("fault_missed")]
    assert len(reasons) == 2
    assert "no complete version" in reasons[1]
    finish(run, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "software"], "give --node"),
        (["--kind", "software", "--node", "5"], "nodes 0 to 0, got [5]"),
        (["--kind", "root", "--node", "0"], "leave --node out"),
        (["--kind", "pause", "--node", "0", "--rank", "0"], "--rank is for software"),
        (["--model", "poisson"], "needs a rate above 0"),
        (["--model", "trace,file=/no/such"], "cannot read the trace /no/such"),
        (["--model", "sunspots"], "failure must be one of"),
        (["--model", "poisson,software=often"], "software must be a number"),
    ],
)
def test_impossible_faults_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_gemini.cli import main

    job = {"job": "j", "nodes": 1, "nproc_per_node": 1, "machines": [], "launcher_pid": os.getpid()}
    job["launcher_start_time"] = start_time(os.getpid())
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert main(["inject", "--run-dir", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
