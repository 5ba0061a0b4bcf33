"""Machines that say which failure domain they are in: no domain holds all copies of a shard."""

from __future__ import annotations

from collections.abc import Callable

from tests.strategies.jobs import Job

MakeJob = Callable[..., Job]
RACKS = ["a", "a", "b", "b"]


def test_a_whole_rack_is_lost_and_nothing_else(make_job: MakeJob) -> None:
    job = make_job(strategy={"stage": 1, "placement": "rack"}, machines=4, nproc=1)
    job.machine_env = {machine: {"LIGHTNING_GEMINI_DOMAIN": rack} for machine, rack in enumerate(RACKS)}
    job.run(stop={"hook": "on_train_batch_end", "step": 4})
    for machine, rack in enumerate(RACKS):
        with job.agent(machine) as client:
            report = client.report()
            assert (report["placement"], report["domains"]) == ("rack", RACKS)
        owners = {owner for owner, _ in job.holdings(machine)}
        assert {RACKS[owner] for owner in owners - {machine}} == {"b" if rack == "a" else "a"}
    for machine in (0, 1):
        job.kill_agent(machine)
    outcome = job.run()
    tiers = [outcome.records[rank][0]["tier"] for rank in range(4)]
    assert tiers == ["remote_memory", "remote_memory", "local_memory", "local_memory"], outcome.output
    assert outcome.start["step"] >= 2
    assert outcome.ended, outcome.output


def test_a_machine_without_a_domain_is_refused_on_all(make_job: MakeJob) -> None:
    job = make_job(strategy={"stage": 1, "placement": "rack"}, machines=2, nproc=1)
    job.machine_env = {0: {"LIGHTNING_GEMINI_DOMAIN": "a"}}
    outcome = job.run()
    assert all(end.code for end in outcome.exits)
    assert outcome.output.count("those of machines 1 are unknown: set LIGHTNING_GEMINI_DOMAIN there") >= 2
