"""``lightning-gemini run`` with real processes, real etcd and real SIGKILLs."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gemini.controlplane.processes import start_time, wait_gone
from tests.cli.conftest import Run
from tests.cli.scripts import ENVIRONMENT, FAILING, STEADY, STUBBORN

Start = Callable[..., Run]
pytestmark = pytest.mark.timeout(120)


def test_a_job_runs_to_its_end_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    run = start(ENVIRONMENT, str(tmp_path), nproc=2, domains="a,b")
    assert run.wait() == 0
    run.assert_nothing_left()
    assert [event["success"] for event in run.events("job_finished")] == [True]
    workers = [json.loads((tmp_path / f"{rank}.json").read_text())["env"] for rank in range(4)]
    assert [env["RANK"] for env in workers] == ["0", "1", "2", "3"]
    assert [env["LOCAL_RANK"] for env in workers] == ["0", "1", "0", "1"]
    assert [env["GROUP_RANK"] for env in workers] == [env["LIGHTNING_GEMINI_NODE"] for env in workers] == list("0011")
    assert [env["LIGHTNING_GEMINI_DOMAIN"] for env in workers] == list("aabb")
    assert [env["LIGHTNING_GEMINI_MACHINE"][-1] for env in workers] == list("0011")
    assert run.job()["domains"] == ["a", "b"]
    same = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "ROLE_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "0"}
    same |= {"MASTER_ADDR": "127.0.0.1", "LIGHTNING_GEMINI_GENERATION": "1", "OMP_NUM_THREADS": "1"}
    same |= {"LIGHTNING_GEMINI_RUN_DIR": str(run.path), "TORCHELASTIC_RUN_ID": run.job()["job"]}
    for env in workers:
        assert same.items() <= env.items()
        assert env["ROLE_RANK"] == env["RANK"]
        assert env["MASTER_PORT"] == workers[0]["MASTER_PORT"]
        assert not [name for name in env if name.startswith("PROTOCOL_BUFFERS")]
    host, port = run.job()["etcd"].split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


def test_a_killed_worker_leads_to_a_new_generation_on_the_same_nodes(start: Start) -> None:
    run = start(STEADY, "2", nproc=2)
    run.until_running(1, workers=4)
    shown = run.call("inject", "--kind", "software", "--node", "1", "--rank", "3", "--run-dir", str(run.path))
    fault = json.loads(shown.stdout)
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    (failure,) = run.events("failure_detected")
    assert (failure["kind"], failure["node"], failure["nodes_lost"]) == ("software", 1, [])
    assert failure["detail"] == f"rank 3 (pid {fault['pids'][0]}) was killed by SIGKILL"
    assert 0 <= failure["time"] - fault["time"] < 1
    killed = [event for event in run.events("worker_exit") if event["pid"] == fault["pids"][0]]
    assert [(event["signal"], event["rank"], event["expected"]) for event in killed] == [("SIGKILL", 3, False)]
    assert len(run.events("member_joined")) == 2
    assert len(run.events("generation_started")) == 2
    assert "rank 0 generation 2" in run.output.read_text()


def root_of(run: Run) -> int:
    return int(json.loads(run.call("status", "--json").stdout)["root"])


@pytest.mark.parametrize("victim", ["root", "other", "both"])
def test_killed_nodes_are_replaced(start: Start, victim: str) -> None:
    run = start(STEADY, "2", nodes=3)
    run.until_running(1, workers=3)
    root = root_of(run)
    nodes = {"root": [root], "other": [(root + 1) % 3], "both": [root, (root + 1) % 3]}[victim]
    words = [word for node in nodes for word in ("--node", str(node))]
    fault = json.loads(run.call("inject", "--kind", "hardware", *words).stdout)
    assert len(fault["pids"]) == 3 * len(nodes)
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    assert not wait_gone(fault["pids"], 0)
    (failure,) = run.events("failure_detected")
    assert (failure["kind"], failure["nodes_lost"]) == ("hardware", sorted(nodes))
    assert failure["time"] - fault["time"] < 6
    joined = [event["node"] for event in run.events("member_joined")]
    assert sorted(joined) == sorted([0, 1, 2, *nodes])


def test_a_single_node_that_dies_starts_again(start: Start) -> None:
    run = start(STEADY, "2", nodes=1)
    run.until_running(1, workers=1)
    run.call("inject", "--kind", "hardware", "--node", "0")
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()


def test_training_goes_on_while_etcd_is_away(start: Start) -> None:
    run = start(STEADY, "2")
    run.until_running(1)
    etcd = next(pid for pid in run.pids() if b"etcdbin/etcd" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(etcd, signal.SIGSTOP)
    time.sleep(4)  # longer than every lease
    os.kill(etcd, signal.SIGCONT)
    time.sleep(5)
    assert len(run.events("generation_started")) == 1, "an outage of the store alone is no failure"
    os.kill(etcd, signal.SIGKILL)
    run.until(lambda: any(pid != etcd and b"etcdbin" in _words(pid) for pid in run.pids()))
    run.call("inject", "--kind", "software", "--node", "0")
    assert run.wait() == 0, run.output.read_text()
    assert len(run.events("generation_started")) == 2
    run.assert_nothing_left()


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_everything(start: Start, number: signal.Signals, code: int) -> None:
    run = start(STUBBORN)
    run.until_running(1)
    logs = [run.path / "logs" / f"node{rank}-rank{rank}.out" for rank in range(2)]
    run.until(lambda: all(log.exists() and log.read_text().startswith("child") for log in logs))
    child = int(logs[1].read_text().split()[1])
    mine = run.pids()
    assert len(mine) >= 2 * 4 + 1
    assert start_time(child) is not None
    run.process.send_signal(number)
    assert run.wait(15) == code
    if number != signal.SIGKILL:
        run.assert_nothing_left()
        assert run.events("job_finished")[0]["reason"] == f"interrupted by {number.name}"
        assert "is lost" not in run.output.read_text()
        assert not wait_gone([*mine, child], 2)
    else:
        # Nobody is left to end what a worker started in a session of its own.
        strays = [pid for pid in run.pids() if _words(pid).startswith(b"sleep")]
        assert not wait_gone([pid for pid in run.pids() if pid not in strays], 5)
        for pid in strays:
            os.kill(pid, signal.SIGKILL)
        assert (run.path / "secret").exists()
        assert (run.path / "etcd" / "data").exists()
        # The next run in that directory removes what the killed launcher left.
        again = start(STEADY, "1")
        assert again.wait() == 0
        again.assert_nothing_left()
        assert not list(run.path.glob("nodes/*/*.sock"))


def test_a_script_that_fails_every_time_ends_the_job_with_its_output(start: Start) -> None:
    run = start(FAILING, max_failures="1")
    assert run.wait() == 1
    run.assert_nothing_left()
    terminal = run.output.read_text()
    assert "RuntimeError: the model is broken" in terminal
    assert "2 failures in a row without a new completed step (newest: 0); rank 1" in terminal
    assert len(run.events("failure_detected")) == 2


def test_status_and_stop_find_the_newest_run(start: Start) -> None:
    run = start(STEADY, "9")
    run.until_running(1)
    table = run.call("status").stdout
    assert f"job {run.job()['job']} (running), generation 1" in table
    assert table.count("pid ") == 2
    assert table.count(" root ") >= 1
    refused = run.call("run", "--run-dir", str(run.path), str(run.path.parent / "script.py"))
    assert refused.returncode == 2
    assert "a live job uses the run directory" in refused.stderr
    assert run.call("stop").returncode == 0
    assert run.wait() == 143
    run.assert_nothing_left()
    assert "(ended)" in run.call("status").stdout
    assert "is not running" in run.call("stop").stdout
    late = run.call("inject", "--kind", "software", "--node", "0")
    assert late.returncode == 2
    assert "is not running" in late.stderr


def test_a_finished_run_directory_can_be_used_again(start: Start) -> None:
    for _ in range(2):
        assert start(STEADY, "1", nodes=1).wait() == 0
    run = start(STEADY, "1", nodes=1)
    assert run.wait() == 0
    assert len(run.events("job_started")) == 1
    assert len(list((run.path / "earlier").iterdir())) == 2
