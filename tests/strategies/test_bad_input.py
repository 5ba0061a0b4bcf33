"""What cannot work is refused before training starts, with the remedy, and memory keeps what it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.controlplane import agent_client
from lightning_gemini.controlplane.agent import AgentSettings, MachineAgent
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.dataplane import capacity
from lightning_gemini.errors import AgentError
from tests.strategies.jobs import Forks, Job, Outcome, assert_same_training

Undisturbed = Callable[..., Outcome]


@pytest.fixture(scope="module")
def held(forks: Forks, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A killed job, whose agent holds its memory."""
    job = Job(forks, tmp_path_factory.mktemp("held"), runtime, strategy={"stage": 2})
    job.run(stop={"hook": "on_train_batch_end", "step": 8})
    yield job
    job.forget()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no replicas": ({"strategy": {"stage": 2, "replicas": 0}}, "replicas must be 1 or more"),
    "replicas": ({"strategy": {"stage": 2, "replicas": 2}}, "use replicas between 1 and 1, or more machines"),
    "placement": ({"strategy": {"stage": 2, "placement": "cube"}}, "placement must be one of mixed, group, ring"),
    "transport": ({"strategy": {"stage": 2, "transport": "pigeon"}}, "transport must be one of tcp"),
    "negative": ({"strategy": {"stage": 2, "checkpoint_every": -1}}, "checkpoint_every must be 0 (off) or more"),
    "other width": ({"width": 16}, "the stored state does not fit this run: parameters was"),
    "other depth": ({"body": ["layernorm"]}, "the stored state does not fit this run: parameters was"),
    "other stage": ({"strategy": {"stage": 3}}, "the stored state does not fit this run: ZeRO stage was 2 and is 3"),
    "other precision": ({"trainer": {"precision": "bf16-true"}}, "the stored state does not fit this run: precision"),
    "no ZeRO": ({"strategy": {"stage": 0}}, "needs ZeRO stage 1, 2 or 3; use GeminiStrategy(stage=...)"),
    "NVMe": (
        {
            "strategy": {
                "stage": 3,
                "offload_optimizer": True,
                "offload_optimizer_device": "nvme",
                "nvme_path": "/tmp",
            }
        },
        "offload to 'cpu' instead",
    ),
    "persist_dir": (
        {"strategy": {"stage": 2, "persist_dir": "/proc/version/here"}},
        "make it writable or choose another",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused(held: Job, name: str) -> None:
    changes, message = REFUSED[name]
    before = held.holdings()
    assert len({version for _, version in before}) == 2
    outcome = held.run(**changes)
    assert_refused(outcome, message)
    assert held.holdings() == before


def assert_refused(outcome: Outcome, message: str) -> None:
    assert [end.code for end in outcome.exits] == [1] * len(outcome.exits), outcome.output
    assert message in outcome.output, outcome.output[-2000:]
    assert not any(record["kind"] == "train" for records in outcome.records for record in records)


def test_another_number_of_ranks_is_refused(held: Job) -> None:
    before, held.nproc = held.holdings(), 1
    try:
        outcome = held.run()
    finally:
        held.nproc = 2
    assert_refused(outcome, "memory holds a job of 1 machines x 2 ranks, this run has 1 x 1")
    assert "lightning-gemini stop" in outcome.output
    assert held.holdings() == before


def test_the_agent_of_another_job_is_refused(held: Job) -> None:
    before = held.holdings()
    held.env = {
        "LIGHTNING_GEMINI_AGENT": str(held.socket_of(0)),
        "LIGHTNING_GEMINI_JOB": "another",
        "LIGHTNING_GEMINI_GENERATION": "1",
    }
    try:
        outcome = held.run()
    finally:
        held.env = {}
    assert_refused(outcome, f"serves job {held.name}, not another")
    assert "unset LIGHTNING_GEMINI_AGENT or stop that agent" in outcome.output
    assert held.holdings() == before


def test_the_agent_of_another_version_is_refused(held: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_client, "__version__", "999.0")
    with pytest.raises(AgentError, match=r"the caller 999\.0: run 'lightning-gemini stop --agents'"):
        AgentClient(held.socket_of(0), held.name)


def test_too_little_memory_is_refused(
    forks: Forks, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda: 100 * 2**20)
    settings = AgentSettings("small", 0, runtime / "small.sock", os.urandom(32))
    job = Job(forks, tmp_path, runtime, strategy={"stage": 1})
    job.env = {
        "LIGHTNING_GEMINI_AGENT": str(settings.socket_path),
        "LIGHTNING_GEMINI_JOB": settings.job,
        "LIGHTNING_GEMINI_GENERATION": "1",
    }
    with MachineAgent(settings) as agent:
        refusals: list[str] = []
        agent.on_fatal = lambda rank, message: refusals.append(message)
        agent.set_peers(1, 2, [agent.replica_address])
        outcome = job.run()
    assert_refused(outcome, "not enough memory for checkpoints: 2 buffers x 1 replicas x 2 ranks")
    assert "100 MiB available (256 MiB stay free); use fewer replicas" in outcome.output
    assert refusals, "the agent must know that a restart is in vain"


def test_memory_is_whole_after_all_that(held: Job, undisturbed: Undisturbed) -> None:
    first = held.attempts[0]
    outcome = held.run()
    assert outcome.ended, outcome.output
    assert outcome.start["tier"] == "local_memory"
    assert_same_training(undisturbed(strategy={"stage": 2}), [first, outcome])
