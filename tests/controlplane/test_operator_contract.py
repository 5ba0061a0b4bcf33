"""What every operator promises, tested against the best there is of each provider."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_gemini.controlplane.operators.base import MachineState
from lightning_gemini.errors import ConfigurationError, OperatorError
from tests.controlplane.aws_cloud import AwsCloud
from tests.controlplane.kube_api import KubeApi
from tests.controlplane.providers import (
    AwsProvider,
    KubernetesProvider,
    ProcessProvider,
    Provider,
    SlurmProvider,
    short_directory,
    states,
)
from tests.dataplane.waiting import wait_until

REMOTE = ("slurm", "kubernetes", "aws")


@pytest.fixture(params=["local", "command", *REMOTE])
def provider(request: pytest.FixtureRequest) -> Iterator[Provider]:
    with short_directory() as name:
        directory = Path(name)
        if request.param == "slurm":
            yield SlurmProvider(request.getfixturevalue("slurm"), directory)
        elif request.param == "kubernetes":
            api = KubeApi()
            api.start()
            yield KubernetesProvider(api, directory)
            api.stop()
        elif request.param == "aws":
            with AwsCloud() as cloud:
                yield AwsProvider(cloud, directory)
        else:
            yield ProcessProvider(request.param, directory)


def test_a_machine_starts_ends_and_is_destroyed(provider: Provider) -> None:
    operator = provider.operator()
    assert operator.machines() == []
    operator.start_machine()
    [asked] = operator.machines()
    assert asked.state in (MachineState.PENDING, MachineState.RUNNING)
    wait_until(lambda: states(operator) == [MachineState.RUNNING], "it runs")
    [running] = operator.machines()
    assert provider.living() == {running.name}

    provider.end(running.name)
    wait_until(lambda: _state_of(operator, running.name) is MachineState.ENDED, "it has ended")
    assert running.name not in provider.living()

    operator.destroy_machine(running.name)
    assert running.name not in {machine.name for machine in operator.machines()}
    operator.destroy_machine(running.name)
    operator.close()
    assert not provider.living()


def test_destroying_ends_one_machine_and_names_are_never_used_again(provider: Provider) -> None:
    operator = provider.operator()
    for _ in range(2):
        operator.start_machine()
    wait_until(lambda: len(provider.living()) == 2, "both are there")
    first, second = [machine.name for machine in operator.machines()]
    operator.destroy_machine(first)
    operator.destroy_machine("never-heard-of")
    assert [machine.name for machine in operator.machines()] == [second]
    wait_until(lambda: provider.living() == {second}, "the first is gone, the second is not")
    operator.start_machine()
    assert operator.machines()[0].name == second
    assert len({first, *(machine.name for machine in operator.machines())}) == 3

    operator.close()
    assert operator.machines() == []
    wait_until(lambda: not provider.living(), "closing ends all")
    operator.close()


@pytest.mark.parametrize("provider", REMOTE, indirect=True)
def test_a_refusal_comes_with_the_reason(provider: Provider) -> None:
    operator, reason = provider.refusing()  # type: ignore[attr-defined]
    with pytest.raises(OperatorError, match=reason):
        operator.start_machine()
    assert operator.machines() == []
    operator.close()


@pytest.mark.parametrize("provider", REMOTE, indirect=True)
def test_a_provider_that_is_away_is_an_error_until_it_is_back(provider: Provider) -> None:
    operator = provider.operator()
    operator.start_machine()
    before = operator.machines()
    with provider.away():
        wait_until(lambda: _raises(operator.machines), "the silence shows")
        with pytest.raises(OperatorError):
            operator.start_machine()
        with pytest.raises(OperatorError):
            operator.destroy_machine(before[0].name)
    wait_until(lambda: not _raises(operator.machines), "the provider is back")
    assert before[0].name in {machine.name for machine in operator.machines()}, "what was there is still known"
    operator.close()
    wait_until(lambda: not provider.living(), "closing ends all")


@pytest.mark.parametrize("provider", REMOTE, indirect=True)
def test_closing_while_the_provider_is_away_raises_nothing_and_says_what_to_do(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    operator = provider.operator()
    operator.start_machine()
    operator.machines()
    with provider.away():
        operator.close()
    assert "may be left" in caplog.text
    wait_until(lambda: not _raises(operator.machines), "the provider is back")
    operator.close()
    wait_until(lambda: not provider.living(), "closing once more ends all")


@pytest.mark.parametrize("provider", REMOTE, indirect=True)
def test_machines_of_a_launcher_that_died_are_found_by_their_job_alone(provider: Provider) -> None:
    provider.operator().start_machine()
    wait_until(lambda: len(provider.living()) == 1, "it is there")
    [name] = provider.living()

    stranger = provider.operator(job="20260301-130000-ffff0000")
    with suppress(ConfigurationError):  # a group of instances is one job's
        assert stranger.machines() == []
    stranger.close()
    assert provider.living() == {name}, "another job's operator leaves it alone"

    successor = provider.operator()
    assert [machine.name for machine in successor.machines()] == [name]
    successor.start_machine()
    assert len({machine.name for machine in successor.machines()}) == 2
    successor.close()
    wait_until(lambda: not provider.living(), "the successor ended them")


def _state_of(operator: object, name: str) -> MachineState | None:
    return {machine.name: machine.state for machine in operator.machines()}.get(name)  # type: ignore[attr-defined]


def _raises(ask: object) -> bool:
    try:
        ask()  # type: ignore[operator]
    except OperatorError:
        return True
    return False
