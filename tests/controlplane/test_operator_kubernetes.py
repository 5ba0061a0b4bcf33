"""The `kubernetes` operator: the official client over HTTP, and Pods that the client's own models accept."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes.client
import pytest

from lightning_gemini.controlplane.operators.base import MachineState
from lightning_gemini.controlplane.operators.kubernetes import KubernetesOperator
from lightning_gemini.controlplane.operators.pod import PodTemplate
from lightning_gemini.errors import ConfigurationError, OperatorError
from tests.controlplane.kube_api import KubeApi
from tests.controlplane.providers import JOB, POD, SECRET, KubernetesProvider, job_access, states
from tests.dataplane.waiting import wait_until

FIRST = f"gemini-{JOB}-0"


@pytest.fixture
def api() -> Iterator[KubeApi]:
    api = KubeApi()
    api.start()
    yield api
    api.stop()


@pytest.fixture
def provider(api: KubeApi, tmp_path: Path) -> KubernetesProvider:
    return KubernetesProvider(api, tmp_path)


def test_the_pod_is_the_users_own_with_what_an_agent_needs(api: KubeApi, provider: KubernetesProvider) -> None:
    operator = provider.operator(run_dir="/runs/now")
    operator.start_machine()
    pod = api.objects["pods"][FIRST]
    sidecar, agent = pod["spec"]["containers"]
    assert sidecar == {"name": "sidecar", "image": "example.com/logs:1"}
    assert agent["command"] == ["lightning-gemini", "agent", "--run-dir", "/runs/now"]
    assert agent["image"] == "example.com/train:1"
    assert agent["envFrom"] == [{"secretRef": {"name": f"gemini-{JOB}"}}]
    given = {entry["name"]: entry for entry in agent["env"]}
    assert given["NCCL_DEBUG"]["value"] == "WARN"
    assert given["LIGHTNING_GEMINI_MACHINE"]["value"] == FIRST
    assert given["LIGHTNING_GEMINI_HOST"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 30
    assert pod["metadata"]["labels"] == {
        "team": "vision",
        "lightning-gemini/job": JOB,
        "lightning-gemini/machine": FIRST,
    }
    operator.close()


def test_the_secret_is_in_a_secret_alone_and_goes_with_the_job(api: KubeApi, provider: KubernetesProvider) -> None:
    operator = provider.operator()
    operator.start_machine()
    secret = api.objects["secrets"][f"gemini-{JOB}"]
    assert secret["stringData"] == job_access(provider.directory).environment()
    assert secret["stringData"]["LIGHTNING_GEMINI_SECRET"] == SECRET
    assert secret["metadata"]["labels"] == {"lightning-gemini/job": JOB}
    assert SECRET not in str(api.objects["pods"])
    operator.close()
    assert api.objects == {"pods": {}, "secrets": {}}


def test_the_clients_own_models_accept_the_pod(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(POD)
    body = PodTemplate.read(tmp_path / "pod.yaml", "job", "secret", None).pod("gemini-job-0")
    pod = kubernetes.client.V1Pod.from_dict(body)
    assert pod is not None
    assert kubernetes.client.ApiClient().sanitize_for_serialization(pod) == body, "nothing that the models do not know"


def test_the_agent_is_told_to_end_before_it_is_made_to(api: KubeApi, provider: KubernetesProvider) -> None:
    operator = provider.operator()
    for _ in range(2):
        operator.start_machine()
    operator.destroy_machine(FIRST)
    assert api.deletions == [(FIRST, 0)]
    operator.close()
    assert api.deletions[1:] == [(f"gemini-{JOB}-1", 5)]


def test_a_pod_that_does_not_end_is_made_to(api: KubeApi, provider: KubernetesProvider, tmp_path: Path) -> None:
    api.obeys = False
    operator = provider.operator()
    operator._access = dataclasses.replace(job_access(tmp_path), stop_timeout_s=0.1)
    operator.start_machine()
    operator.close()
    assert not api.objects["pods"]
    assert api.deletions[-1] == (FIRST, 0)


def test_a_pod_that_waits_says_why(api: KubeApi, provider: KubernetesProvider) -> None:
    api.schedules = False
    operator = provider.operator()
    operator.start_machine()
    why = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no GPU"}
    api.set_status(FIRST, "Pending", conditions=[why])
    [machine] = operator.machines()
    assert machine.state is MachineState.PENDING
    assert "Unschedulable: 0/3 nodes: no GPU" in machine.detail
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    api.set_status(FIRST, "Pending", containerStatuses=[_container("agent", waiting)])
    wait_until(lambda: "ImagePullBackOff: no such image" in operator.machines()[0].detail, "the new reason shows")
    operator.close()


@pytest.mark.parametrize(
    ("phase", "fields", "state", "returncode"),
    [
        ("Succeeded", {"exit": 0}, MachineState.ENDED, 0),
        ("Failed", {"exit": 1}, MachineState.ENDED, 1),
        ("Failed", {"exit": 137}, MachineState.ENDED, -9),
        ("Failed", {"exit": 1, "reason": "Evicted"}, MachineState.ENDED, None),
        ("Failed", {"reason": "NodeLost"}, MachineState.ENDED, None),
        ("Unknown", {}, MachineState.RUNNING, None),
    ],
)
def test_how_a_pod_ended(
    api: KubeApi, provider: KubernetesProvider, phase: str, fields: dict[str, Any], state: MachineState, returncode: int
) -> None:
    operator = provider.operator()
    operator.start_machine()
    status = {key: value for key, value in fields.items() if key == "reason"}
    if "exit" in fields:
        ended = {"terminated": {"exitCode": fields["exit"], "reason": "Error"}}
        status["containerStatuses"] = [_container("sidecar", {"running": {}}), _container("agent", ended)]
    api.set_status(FIRST, phase, **status)
    [machine] = operator.machines()
    assert (machine.state, machine.returncode) == (state, returncode), machine
    operator.close()


def test_a_pod_that_is_being_deleted_has_ended(api: KubeApi, provider: KubernetesProvider) -> None:
    operator = provider.operator()
    operator.start_machine()
    api.obeys = False
    api.objects["pods"][FIRST]["metadata"]["deletionTimestamp"] = "2026-03-01T12:00:00Z"
    assert states(operator) == [MachineState.ENDED], "a drained node does not give it back"
    operator.destroy_machine(FIRST)
    operator.close()


@pytest.mark.parametrize(("status", "message"), [(403, "pods is forbidden: User u"), (410, "too old resource version")])
def test_a_refused_list_is_an_error_once(api: KubeApi, provider: KubernetesProvider, status: int, message: str) -> None:
    operator = provider.operator()
    operator.start_machine()
    api.refusals.append(("GET", "pods", status, message))
    with pytest.raises(OperatorError, match=rf"list Pods \(HTTP {status}\): {message}"):
        operator.machines()
    assert [machine.name for machine in operator.machines()] == [FIRST]
    operator.close()


def test_a_pod_whose_answer_was_lost_is_not_asked_for_twice(api: KubeApi, provider: KubernetesProvider) -> None:
    operator = provider.operator()
    operator.start_machine()
    second = f"gemini-{JOB}-1"
    there = {**api.objects["pods"][FIRST], "metadata": {**api.objects["pods"][FIRST]["metadata"], "name": second}}
    api.objects["pods"][second] = there
    operator.start_machine()  # HTTP 409
    assert [machine.name for machine in operator.machines()] == [FIRST, second]
    operator.close()


def test_what_cannot_work_is_refused(
    provider: KubernetesProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="name the file of a Pod"):
        KubernetesOperator({}, job_access(tmp_path))
    with pytest.raises(ConfigurationError, match=r"no cluster is configured here .*nowhere"):
        provider.operator(context="nowhere")
    with pytest.raises(ConfigurationError, match="has no setting 'pods'; it has: pod_template"):
        provider.operator(pods=3)
    with pytest.raises(ConfigurationError, match="poll_s must be a positive number"):
        provider.operator(poll_s=0)
    for content, words in (
        ("kind: Job", "must hold a Pod, found 'Job'"),
        ("kind: Pod", "has no spec.containers"),
        ("[", "cannot read"),
    ):
        provider.template.write_text(content)
        with pytest.raises(ConfigurationError, match=words):
            provider.operator()
    provider.template.write_text(POD)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigurationError, match="lightning-gemini\\[kubernetes\\]"):
        provider.operator()


def test_a_wrong_token_is_an_error_with_the_servers_words(provider: KubernetesProvider) -> None:
    provider.kubeconfig.write_text(provider.kubeconfig.read_text().replace("a-token", "another"))
    with pytest.raises(OperatorError, match=r"HTTP 401\): Unauthorized"):
        provider.operator().machines()


def _container(name: str, state: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "state": state, "ready": False, "restartCount": 0, "image": "i", "imageID": "i"}
