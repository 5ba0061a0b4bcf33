"""The Pod of a machine: from the user's template to what the cluster is given, and from its status to a machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.operators.base import Machine, MachineState
from lightning_gemini.errors import ConfigurationError

JOB_LABEL = "lightning-gemini/job"
MACHINE_LABEL = "lightning-gemini/machine"

_STATES = {
    "Pending": MachineState.PENDING,
    "Running": MachineState.RUNNING,
    "Unknown": MachineState.RUNNING,  # its node is silent: whether the agent is, its lease tells
}
_FROM_SIGNAL = 128
_CONTAINER = "agent"


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """The user's Pod.

    Attributes:
        body: As the API takes it.
        job_label: Value of the label by which all Pods of the job are found.
        secret: Name of the Secret with the variables that the agent reads.
        run_dir: The run's directory as the Pods see it, or None.
    """

    body: Mapping[str, Any]
    job_label: str
    secret: str
    run_dir: str | None = None

    @classmethod
    def read(cls, path: Path, job_label: str, secret: str, run_dir: str | None) -> PodTemplate:
        """Reads a file.

        Raises:
            ConfigurationError: If it holds no Pod with a container.
        """
        import yaml  # type: ignore[import-untyped]

        try:
            body = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigurationError(f"operator kubernetes: cannot read pod_template {path} ({error})") from error
        if not isinstance(body, dict) or body.get("kind") != "Pod":
            found = body.get("kind") if isinstance(body, dict) else type(body).__name__
            raise ConfigurationError(f"operator kubernetes: pod_template {path} must hold a Pod, found {found!r}")
        spec = body.get("spec")
        containers = spec.get("containers") if isinstance(spec, dict) else None
        if not (isinstance(containers, list) and containers and all(isinstance(one, dict) for one in containers)):
            raise ConfigurationError(f"operator kubernetes: the Pod of {path} has no spec.containers: give it one")
        return cls(body, job_label, secret, run_dir)

    def pod(self, name: str) -> dict[str, Any]:
        """Returns the Pod of one machine; the user's own command and variables win over ours."""
        body = copy.deepcopy(dict(self.body))
        metadata = body.get("metadata") or {}
        labels = {**(metadata.get("labels") or {}), JOB_LABEL: self.job_label, MACHINE_LABEL: name}
        metadata.pop("generateName", None)
        body["apiVersion"], body["metadata"] = "v1", {**metadata, "name": name, "labels": labels}
        body["spec"]["restartPolicy"] = "Never"  # an agent that comes back would be another machine
        self._complete(_agent_container(body["spec"]["containers"]), name)
        return body

    def _complete(self, container: dict[str, Any], name: str) -> None:
        container["envFrom"] = [*(container.get("envFrom") or []), {"secretRef": {"name": self.secret}}]
        own = {
            "LIGHTNING_GEMINI_HOST": {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            # Pods of one node go together.
            "LIGHTNING_GEMINI_DOMAIN": {"valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        }
        given = [entry for entry in container.get("env") or [] if entry.get("name") != "LIGHTNING_GEMINI_MACHINE"]
        names = {entry.get("name") for entry in given}
        ours = [{"name": key, **value} for key, value in own.items() if key not in names]
        container["env"] = [*given, *ours, {"name": "LIGHTNING_GEMINI_MACHINE", "value": name}]
        if not container.get("command") and not container.get("args"):
            where = ["--run-dir", self.run_dir] if self.run_dir else []
            container["command"] = ["lightning-gemini", "agent", *where]


def machine_of(pod: Any) -> Machine:
    """Reads a ``V1Pod`` of the client.

    A Pod that somebody has begun to delete counts as ended: it does not come back. An exit code counts only where the
    agent ended by itself; a Pod that was evicted, or lost with its node, says nothing about its agent.
    """
    status, name = pod.status, pod.metadata.name
    if pod.metadata.deletion_timestamp is not None:
        return Machine(name, MachineState.ENDED, detail=f"its Pod is being deleted (on {pod.spec.node_name})")
    state = _STATES.get(status.phase, MachineState.ENDED)
    ended = _terminated(pod) if state is MachineState.ENDED and status.reason is None else None
    code = None if ended is None else _returncode(ended.exit_code)
    return Machine(name, state, returncode=code, detail=_detail(pod))


def _agent_container(containers: list[dict[str, Any]]) -> dict[str, Any]:
    return next((one for one in containers if one.get("name") == _CONTAINER), containers[0])


def _agent_status(pod: Any) -> Any | None:
    statuses = pod.status.container_statuses or []
    named = [one.name for one in pod.spec.containers]
    name = _CONTAINER if _CONTAINER in named else named[0]
    return next((status for status in statuses if status.name == name), None)


def _terminated(pod: Any) -> Any | None:
    status = _agent_status(pod)
    return status.state.terminated if status is not None and status.state is not None else None


def _returncode(exit_code: int) -> int:
    """From how a shell counts to how `subprocess` does."""
    return _FROM_SIGNAL - exit_code if exit_code > _FROM_SIGNAL else exit_code


def _detail(pod: Any) -> str:
    """The most telling of what the status says: why it waits, why it ended, on which node it is."""
    status, said = pod.status, [f"Pod {pod.status.phase}"]
    if pod.spec.node_name:
        said.append(f"on {pod.spec.node_name}")
    container = _agent_status(pod)
    state = container.state if container is not None else None
    for part in (state and state.waiting, state and state.terminated):
        if part:
            said.append(": ".join(filter(None, [part.reason, part.message])) or f"exit code {part.exit_code}")
    said += [f"{one.reason}: {one.message}" for one in status.conditions or [] if one.reason == "Unschedulable"]
    said += [": ".join(filter(None, [status.reason, status.message]))] if status.reason else []
    return ", ".join(filter(None, said))
