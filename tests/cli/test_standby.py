"""Machines that stand by: they take over at once, are replenished, and roots may die or sleep meanwhile."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gemini.controlplane.processes import wait_gone
from tests.cli.conftest import Run
from tests.cli.scripts import STEADY, UNTIL_FILE
from tests.cli.watched import Watched

Start = Callable[..., Run]
Watch = Callable[[Run], Watched]
SLACK_S = 3.0  # on a busy machine
pytestmark = pytest.mark.timeout(120)


def test_a_standby_takes_over_at_once_and_is_replenished(start: Start, watch: Watch, tmp_path: Path) -> None:
    run = start(UNTIL_FILE, str(tmp_path / "enough"), standby="1")
    run.until_running(1)
    watched = watch(run)
    (waiting,) = watched.standbys(1)
    assert waiting.name == "machine-2"
    assert f"standing by: machine-2 (pid {waiting.pid}" in run.call("status").stdout
    fault = json.loads(run.call("inject", "--kind", "hardware", "--node", "1").stdout)
    run.until_running(2)
    joined = [event for event in run.events("member_joined") if event["node"] == 1][-1]
    assert (joined["name"], joined["pid"]) == ("machine-2", waiting.pid)
    booted = {event["pid"]: event["time"] for event in run.events("spare_joined")}
    assert booted[joined["pid"]] < fault["time"], "it was there before the failure"
    (fresh,) = watched.standbys(1)
    assert fresh.name == "machine-3"
    (tmp_path / "enough").touch()
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    (failure,) = run.events("failure_detected")
    assert (failure["kind"], failure["nodes_lost"]) == ("hardware", [1])
    assert 0 <= failure["time"] - fault["time"] < 3 + SLACK_S


def test_roots_that_are_killed_in_the_middle_of_a_recovery(start: Start, watch: Watch, tmp_path: Path) -> None:
    run = start(UNTIL_FILE, str(tmp_path / "enough"), nodes=3, standby="2")
    run.until_running(1, workers=3)
    watched = watch(run)
    watched.standbys(2)
    killed: list[str] = []
    for _ in range(3):
        root = run.until(lambda: (found := watched.root())["name"] not in killed and found)
        os.kill(root["pid"], signal.SIGKILL)
        assert not wait_gone([root["pid"]], 5)
        killed.append(root["name"])
    run.until(lambda: len(run.events("failure_detected")) and all_run(watched, killed))
    (tmp_path / "enough").touch()
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    starts = [event["generation"] for event in run.events("generation_started")]
    assert starts == sorted(set(starts)), "one root for each generation"
    pairs = [(event["node"], event["generation"]) for event in run.events("workers_started")]
    assert len(pairs) == len(set(pairs)), "each machine starts each generation once"


def all_run(watched: Watched, gone: list[str]) -> bool:
    """Says whether workers of the newest generation run on every node, and none of it is a machine that is gone."""
    order = watched.read(watched.keys.order)
    names = {member["name"] for member in order["members"]}
    events = watched.run.events("workers_started")
    started = [event for event in events if event["generation"] == order["generation"]]
    return order["phase"] == "start" and not names & set(gone) and len(started) == len(names)


def test_a_root_that_sleeps_beyond_its_lease_wakes_up_without_a_say(start: Start, watch: Watch) -> None:
    run = start(STEADY, "2", standby="1")
    run.until_running(1)
    watched = watch(run)
    watched.standbys(1)
    pid = watched.root()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        run.until_running(2)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    assert [event["generation"] for event in run.events("generation_started")] == [1, 2]
    assert len([event for event in run.events("workers_started") if event["generation"] == 2]) == 2
