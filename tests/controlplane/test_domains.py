"""Failure domains reach everyone who plans a placement: the stores that hold replicas, and the root."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lightning_gemini.controlplane.agent import MachineAgent
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.controlplane.failure import plan_from_reports
from lightning_gemini.controlplane.orders import Report
from lightning_gemini.core.recovery import Tier, VersionId
from lightning_gemini.errors import PlacementError, ProtocolError
from tests.controlplane.agents import JOB, ShortDirectory, introduce, make_agent
from tests.dataplane.machines import write_version
from tests.dataplane.waiting import wait_until

RACKS = ("a", "a", "b", "b")
SIZE = 5000


@pytest.fixture
def agents() -> Iterator[list[MachineAgent]]:
    with ExitStack() as stack:
        directory = ShortDirectory()
        stack.callback(directory.remove)
        started = [stack.enter_context(make_agent(directory.path, machine)) for machine in range(len(RACKS))]
        introduce(started)
        yield started


def publish(agents: list[MachineAgent], placement: str, domains: tuple[str, ...] | None) -> None:
    """Every rank writes version 1, and waits until its holders have it."""
    with ExitStack() as stack:
        buffers = []
        for rank, agent in enumerate(agents):
            client = stack.enter_context(AgentClient(agent.settings.socket_path, JOB))
            client.join(rank, 2, placement, domains)
            slab = client.attach(SIZE)
            stack.callback(slab.close)
            buffers.append((client, slab.buffers[0]))
        for client, buffer in buffers:
            client.notify()
            write_version(buffer, VersionId(1, 1), SIZE)
            client.notify()
        for _, buffer in buffers:
            wait_until(lambda buffer=buffer: buffer.acked == VersionId(1, 1), "replicated")  # type: ignore[misc]


def report(machine: int, memory: dict[str, object]) -> Report:
    return Report(machine, 2, f"{machine}.1", 0, memory)


@pytest.mark.parametrize(("placement", "survives"), [("rack", True), ("mixed", False)])
def test_the_loss_of_a_rack(agents: list[MachineAgent], placement: str, survives: bool) -> None:
    publish(agents, placement, RACKS)
    memories = {machine: agent.report() for machine, agent in enumerate(agents)}
    assert all(memory["domains"] == list(RACKS) for memory in memories.values())
    for machine, agent in enumerate(agents):
        held = {buffer.owner for slab in agent._store.slabs() for buffer in slab.complete()} - {machine}
        assert all((RACKS[owner] != RACKS[machine]) == survives for owner in held)
    left = {machine: report(machine, memories[machine]) for machine in (2, 3)}
    plan = plan_from_reports(left, len(RACKS), 1)
    assert (plan.id is not None) == survives
    if survives:
        assert plan.tiers == (Tier.REMOTE_MEMORY, Tier.REMOTE_MEMORY, Tier.LOCAL_MEMORY, Tier.LOCAL_MEMORY)


def test_what_is_no_list_of_domains_is_refused(agents: list[MachineAgent]) -> None:
    with AgentClient(agents[0].settings.socket_path, JOB) as client:
        with pytest.raises(ProtocolError, match="'domains': expected a text"):
            client.join(0, 2, "rack", (1, 2, 3, 4))  # type: ignore[arg-type]
        with pytest.raises(PlacementError, match="got 2 for 4 machines"):
            client.join(0, 2, "rack", ("a", "b"))
        with pytest.raises(PlacementError, match="needs the failure domain of every machine"):
            client.join(0, 2, "rack")
        assert client.report()["replicas"] is None
