"""Who may be a machine of a job, and who counts as lost: strangers, machines that hang, sleep, or lose their store."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from lightning_gemini.controlplane.membership import Assignment, Member, Spare
from lightning_gemini.controlplane.processes import wait_gone
from lightning_gemini.controlplane.session import Session
from tests.cli.conftest import Run
from tests.cli.scripts import STEADY, UNTIL_FILE
from tests.cli.watched import Watched

Start = Callable[..., Run]
Watch = Callable[[Run], Watched]
pytestmark = pytest.mark.timeout(120)


def test_agents_of_another_job_or_with_another_secret_are_refused(start: Start, watch: Watch, tmp_path: Path) -> None:
    run = start(UNTIL_FILE, str(tmp_path / "enough"))
    run.until_running(1)
    job = run.job()
    where = ["--etcd", job["etcd"], "--wait", "0.1", "--name", "stranger"]
    wrong = tmp_path / "wrong"
    wrong.write_text("ab" * 32)
    known = ["--secret-file", job["secret_file"]]
    elsewhere = run.call("agent", *where, *known, "--job", "nope")
    unknown = run.call("agent", *where, "--secret-file", str(wrong), "--job", job["job"])
    unnamed = run.call("agent", *where, *known, "--job", job["job"], "--name", "../stranger")
    assert [done.returncode for done in (elsewhere, unknown, unnamed)] == [2, 2, 2]
    assert "found no job nope at" in elsewhere.stderr
    assert f"is not that of job {job['job']}" in unknown.stderr
    assert "a machine's name is" in unnamed.stderr
    watched = watch(run)
    assert watched.standbys(0) == []
    (tmp_path / "enough").touch()
    assert run.wait() == 0
    run.assert_nothing_left()


@pytest.mark.parametrize("operator", ["command", "command,command='sh -c \"{agent}\"'"])
def test_machines_may_come_from_any_command(start: Start, operator: str) -> None:
    run = start(STEADY, "2", operator=operator)
    run.until_running(1)
    fault = json.loads(run.call("inject", "--kind", "hardware", "--node", "1").stdout)
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    assert not wait_gone(fault["pids"], 0)
    assert [event["name"] for event in run.events("member_joined") if event["node"] == 1] == ["machine-1", "machine-2"]


def test_machines_of_a_command_end_with_a_launcher_that_is_killed(start: Start) -> None:
    run = start(STEADY, "9", operator="command")
    run.until_running(1)
    pids = run.pids()
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    assert not wait_gone(pids, 20)


def test_a_machine_that_lives_but_never_answers_is_given_up(start: Start, watch: Watch, tmp_path: Path) -> None:
    """The test plays that machine: it holds its lease, takes its slot, and hears no order."""
    run = start(UNTIL_FILE, str(tmp_path / "enough"), report_timeout="2")
    run.until_running(1)
    watched = watch(run)
    renewed: list[int] = []
    session = Session(watched.store, 2, renewed.append)
    session.start()
    try:
        spare = Spare("idler", "127.0.0.1", os.getpid(), "idler-1")
        watched.store.put(watched.keys.spare("idler"), json.dumps(asdict(spare)), session.lease)
        run.call("inject", "--kind", "hardware", "--node", "1")
        meant = asdict(Assignment("idler", "idler-1"))
        run.until(lambda: watched.read(watched.keys.assignment(1)) == meant)
        member = Member(1, "127.0.0.1", 1, spare.pid, spare.incarnation, spare.name)
        watched.store.put_if_absent(watched.keys.member(1), json.dumps(asdict(member)), session.lease)
        watched.store.delete(watched.keys.spare("idler"))
        wish = {"name": "idler", "incarnation": "idler-1", "evict": True}
        run.until(lambda: watched.read(watched.keys.replace(1)) == wish)
    finally:
        session.close()  # its provider ends it
    assert not renewed
    run.until(lambda: any(event["generation"] >= 3 for event in run.events("workers_started")))
    (tmp_path / "enough").touch()
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    assert "node 1 (idler) answers no order although it lives" in run.output.read_text()


def test_a_root_that_sleeps_while_etcd_dies_costs_no_restart(start: Start, watch: Watch, tmp_path: Path) -> None:
    run = start(UNTIL_FILE, str(tmp_path / "enough"))
    run.until_running(1)
    watched = watch(run)
    root = watched.root()["pid"]
    (etcd,) = run.job()["etcd_pids"]
    os.kill(root, signal.SIGSTOP)
    awake = threading.Timer(3.0, os.kill, (root, signal.SIGCONT))
    awake.start()
    os.kill(etcd, signal.SIGKILL)
    awake.join()
    run.until(lambda: run.job()["etcd_pids"] not in ([], [etcd]))
    run.until(lambda: sorted(watched.members()) == [0, 1] and watched.root())
    time.sleep(3)  # a lease more, in which nothing happens
    (tmp_path / "enough").touch()
    assert run.wait() == 0, run.output.read_text()
    run.assert_nothing_left()
    assert len(run.events("generation_started")) == 1
    assert len(run.events("member_joined")) == 2
