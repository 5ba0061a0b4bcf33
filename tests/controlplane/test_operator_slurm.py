"""The `slurm` operator against a real Slurm on loopback: what it submits, and how its jobs end."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gemini.controlplane.operators.base import Machine, MachineState, Operator
from lightning_gemini.controlplane.operators.slurm import SlurmOperator, SlurmSettings, _parse, _state
from lightning_gemini.errors import ConfigurationError
from tests.controlplane.providers import JOB, SECRET, SlurmProvider, job_access, states
from tests.controlplane.slurm_cluster import SlurmCluster
from tests.dataplane.waiting import wait_until


@pytest.fixture
def provider(slurm: SlurmCluster, tmp_path: Path) -> SlurmProvider:
    return SlurmProvider(slurm, tmp_path)


def test_the_agent_gets_the_secret_by_its_environment_alone(
    provider: SlurmProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")  # of an allocation that the launcher itself runs in
    operator = provider.operator(setup=["export LIGHTNING_GEMINI_DOMAIN=rack-7"])
    operator.start_machine()
    wait_until(lambda: states(operator) == [MachineState.RUNNING], "it runs")
    [machine] = operator.machines()
    log = provider.directory / "logs" / f"{machine.name}.out"
    wait_until(lambda: log.exists() and "MACHINE" in log.read_text(), "the agent has started")
    shown = provider.cluster.command("scontrol", "show", "job").stdout
    assert SECRET not in shown
    assert machine.name in shown
    operator.close()
    wait_until(lambda: "ended gently" in log.read_text(), "it was asked to end before it was made to")
    printed = log.read_text().splitlines()
    assert printed[0] == "arguments: -m lightning_gemini.cli agent"
    assert f"LIGHTNING_GEMINI_SECRET={SECRET}" in printed
    assert f"LIGHTNING_GEMINI_MACHINE={machine.name}" in printed
    assert f"LIGHTNING_GEMINI_JOB={JOB}" in printed
    assert "LIGHTNING_GEMINI_DOMAIN=rack-7" in printed


def test_destroying_does_not_wait_for_an_agent_that_will_not_end(provider: SlurmProvider) -> None:
    provider.python.write_text("#!/bin/bash\ntrap '' TERM\necho $$\nwhile :; do sleep 0.1; done\n")
    operator = provider.operator()
    operator.start_machine()
    wait_until(lambda: states(operator) == [MachineState.RUNNING], "it runs")
    [machine] = operator.machines()
    log = provider.directory / "logs" / f"{machine.name}.out"
    wait_until(lambda: log.exists() and log.read_text().strip(), "it says who it is")
    pid = int(log.read_text().split()[0])
    operator.destroy_machine(machine.name)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone", timeout_s=4)  # KillWait is 5
    operator.close()


def test_how_an_agent_ended_is_told(provider: SlurmProvider) -> None:
    operator = provider.operator()
    provider.python.write_text("#!/bin/bash\nexit 3\n")
    operator.start_machine()
    ended = _ended(operator)
    assert ended.returncode == 3
    assert "NonZeroExitCode" in ended.detail
    wait_until(lambda: "FAILED" in operator.machines()[0].detail, "the job is complete")
    assert operator.machines()[0].returncode == 3
    operator.close()


def test_a_machine_waits_until_a_node_is_free(provider: SlurmProvider) -> None:
    operator = provider.operator(extra=["--begin=now+1hour"])
    operator.start_machine()
    wait_until(lambda: "BeginTime" in operator.machines()[0].detail, "Slurm says why it waits")
    assert states(operator) == [MachineState.PENDING]
    operator.close()
    assert not provider.living()


def test_what_slurm_prints() -> None:
    number, machine = _parse("12|FAILED|9|JobLaunchFailure|gem1|gemini-a-3|\n")
    detail = "Slurm job 12 FAILED on gem1 (JobLaunchFailure)"
    assert (number, machine) == ("12", Machine("gemini-a-3", MachineState.ENDED, returncode=-9, detail=detail))
    _, machine = _parse("12|COMPLETING|768|NonZeroExitCode|gem0|gemini-a-3|\n")
    assert (machine.state, machine.returncode) == (MachineState.ENDED, 3), "its node is being cleaned up"
    for state in ("TIMEOUT", "PREEMPTED", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"):
        _, machine = _parse(f"1|{state}|256|None|gem0|gemini-a-0|\n")
        assert (machine.state, machine.returncode) == (MachineState.ENDED, None), "Slurm ended it, so it is replaced"
    assert _state("CONFIGURING") is MachineState.PENDING
    assert _state("SUSPENDED") is MachineState.RUNNING
    assert _state("COMPLETING") is MachineState.ENDED


def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="extra must be a list, got '--qos=high'"):
        SlurmSettings(extra="--qos=high")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="has no setting 'queue'; it has: partition"):
        SlurmOperator({"queue": "gpu"}, job_access(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no squeue on this host"):
        SlurmOperator({}, job_access(tmp_path)).start_machine()


def _ended(operator: Operator) -> Machine:
    wait_until(lambda: states(operator) == [MachineState.ENDED], "it has ended")
    return operator.machines()[0]
