"""Machines that are Pods of a Kubernetes cluster, made from the user's own template."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.operators.base import JobAccess, Machine, MachineState
from lightning_gemini.controlplane.operators.listing import Listing
from lightning_gemini.controlplane.operators.pod import JOB_LABEL, PodTemplate, machine_of
from lightning_gemini.controlplane.operators.pod_api import PodApi
from lightning_gemini.controlplane.operators.settings import check_positive, read_settings
from lightning_gemini.errors import ConfigurationError, OperatorError

_log = logging.getLogger(__name__)
_NOT_IN_NAMES = re.compile(r"[^a-z0-9-]+")


@dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """What ``conf/gemini/operator/kubernetes.yaml`` holds; see there.

    Attributes:
        pod_template: YAML file with a Pod, whose container ``agent``, or else the first, is to run the agent.
        namespace: Where the Pods are made.
        context: Of the kubeconfig file; None: its current one, or the cluster that the launcher itself runs in.
        kubeconfig: None: where kubectl looks for it.
        run_dir: The run's directory as the Pods see it; None: as the launcher does.
        poll_s: Seconds between two questions to the API server.
        timeout_s: Seconds that one call may take.
    """

    pod_template: str | None = None
    namespace: str = "default"
    context: str | None = None
    kubeconfig: str | None = None
    run_dir: str | None = None
    poll_s: float = 1.0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.pod_template:
            raise ConfigurationError(
                'operator kubernetes: name the file of a Pod: --operator "kubernetes,pod_template=pod.yaml"'
            )
        check_positive("kubernetes", poll_s=self.poll_s, timeout_s=self.timeout_s)


class KubernetesOperator:
    """Makes one Pod a machine, and one Secret that tells all of them how to join the job.

    Pods that an earlier launcher of the same job left are found by their labels and belong to this one too.

    Args:
        settings: See `KubernetesSettings`.
        access: The job.

    Raises:
        ConfigurationError: If a setting or the template is impossible, or the client is not installed.
    """

    def __init__(self, settings: Mapping[str, Any], access: JobAccess) -> None:
        chosen = read_settings(KubernetesSettings, "kubernetes", settings)
        self._access = access
        self._label = _NOT_IN_NAMES.sub("-", access.job.lower()).strip("-")[:40].rstrip("-")
        self._secret = f"gemini-{self._label}"
        self._template = PodTemplate.read(Path(str(chosen.pod_template)), self._label, self._secret, chosen.run_dir)
        self._api = PodApi(chosen.namespace, chosen.context, chosen.kubeconfig, chosen.timeout_s)
        self._pods: dict[str, None] = {}  # asked for and not destroyed, in that order
        self._destroyed: set[str] = set()
        self._last: dict[str, Machine] = {}
        self._next: int | None = None
        self._listing = Listing(self._ask, chosen.poll_s)

    def start_machine(self) -> None:
        """See `Operator.start_machine`."""
        if self._next is None:
            self._listing.get()  # so that a name of an earlier launcher is not used again
            self._api.put_secret(self._secret, {JOB_LABEL: self._label}, self._access.environment())
            self._next = 1 + max((_number(name) for name in self._pods), default=-1)
        name = f"{self._secret}-{self._next}"
        self._next += 1
        self._listing.forget()
        self._api.create_pod(self._template.pod(name))
        self._pods[name] = None

    def machines(self) -> list[Machine]:
        """See `Operator.machines`."""
        return self._listing.get()

    def destroy_machine(self, name: str) -> None:
        """See `Operator.destroy_machine`."""
        if name not in self._pods:
            return
        self._api.delete_pod(name, grace_s=0)
        self._destroyed.add(name)
        del self._pods[name]
        self._listing.forget()

    def close(self) -> None:
        """See `Operator.close`; what cannot be ended is logged with the command that does it."""
        try:
            self._close_gently()
            for name in list(self._pods):
                self.destroy_machine(name)
            self._api.delete_secret(self._secret)
            self._next = None
        except OperatorError as error:
            _log.error(
                "Pods of job %s may be left (%s); end them with: kubectl --namespace %s delete pod,secret -l %s=%s",
                self._access.job,
                error,
                self._api.namespace,
                JOB_LABEL,
                self._label,
            )

    def _close_gently(self) -> None:
        self._listing.forget()
        living = [machine.name for machine in self.machines() if machine.state is not MachineState.ENDED]
        for name in living:
            self._api.delete_pod(name, grace_s=max(1, round(self._access.stop_timeout_s)))
        if living:
            self._listing.wait(lambda _: not self._api.pods(f"{JOB_LABEL}={self._label}"), self._access.stop_timeout_s)

    def _ask(self) -> list[Machine]:
        told: dict[str, Machine] = {}
        for pod in self._api.pods(f"{JOB_LABEL}={self._label}"):
            machine = machine_of(pod)
            if machine.name not in self._destroyed:
                told[machine.name] = machine
        for name in sorted(told, key=_number):
            self._pods.setdefault(name)
        return [self._current(name, told) for name in self._pods]

    def _current(self, name: str, told: Mapping[str, Machine]) -> Machine:
        """A Pod that is no more was deleted by somebody else, or its node was."""
        forgotten = self._last.get(name)
        if forgotten is None or forgotten.state is not MachineState.ENDED:
            forgotten = Machine(name, MachineState.ENDED, detail="its Pod was deleted")
        self._last[name] = told.get(name, forgotten)
        return self._last[name]


def _number(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
