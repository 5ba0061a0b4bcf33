"""Providers of machines for the tests of operators: what a person, a failure or the provider itself can do to them."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from lightning_gemini.controlplane.operators.aws import AwsOperator
from lightning_gemini.controlplane.operators.base import JobAccess, MachineState, Operator
from lightning_gemini.controlplane.operators.command import CommandOperator
from lightning_gemini.controlplane.operators.kubernetes import KubernetesOperator
from lightning_gemini.controlplane.operators.local import LocalOperator
from lightning_gemini.controlplane.operators.slurm import SlurmOperator
from lightning_gemini.controlplane.processes import children_of, start_time, wait_gone
from tests.controlplane.aws_cloud import REGION, AwsCloud
from tests.controlplane.kube_api import NAMESPACE, KubeApi
from tests.controlplane.slurm_cluster import SlurmCluster

JOB = "20260301-120000-0123abcd"
SECRET = "0123456789abcdef" * 4
STOP_S = 5.0
POD = """\
apiVersion: v1
kind: Pod
metadata:
  labels: {team: vision}
spec:
  terminationGracePeriodSeconds: 30
  containers:
  - name: sidecar
    image: example.com/logs:1
  - name: agent
    image: example.com/train:1
    env: [{name: NCCL_DEBUG, value: WARN}]
"""
AGENT = """\
#!/bin/bash
echo "arguments: $@"
env | grep ^LIGHTNING_GEMINI_
trap 'echo ended gently; exit 0' TERM
while :; do sleep 0.1; done
"""
"""Instead of the interpreter: says how it was started, and waits."""


def job_access(directory: Path, job: str = JOB) -> JobAccess:
    (directory / "logs").mkdir(exist_ok=True)
    secret = directory / "secret"
    secret.write_text(SECRET)
    return JobAccess(job, "10.0.0.1:2379", secret, directory, 3, STOP_S)


def states(operator: Operator) -> list[MachineState]:
    return [machine.state for machine in operator.machines()]


class Provider(Protocol):
    """One of each kind."""

    outlives_launcher: bool

    def operator(self, job: str = JOB) -> Operator:
        """A launcher's; with the same job, that of its successor."""

    def living(self) -> set[str]:
        """Machines that the provider itself says are there or coming."""

    def end(self, name: str) -> None:
        """Ends a machine from outside."""

    def refusing(self) -> tuple[Operator, str]:
        """An operator that gets no machine, and words of the reason."""

    def away(self) -> contextlib.AbstractContextManager[None]:
        """The provider does not answer for a while."""


class SlurmProvider:
    outlives_launcher = True

    def __init__(self, cluster: SlurmCluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.python = directory / "python"
        self.python.write_text(AGENT)
        self.python.chmod(0o755)

    def operator(self, job: str = JOB, **settings: Any) -> SlurmOperator:
        quick = {"poll_s": 0.05, "timeout_s": 1.0, "python": str(self.python)}
        return SlurmOperator({**quick, **settings}, job_access(self.directory, job))

    def living(self) -> set[str]:
        return set(self.cluster.command("squeue", "-h", "-t", "PD,R,CF", "-o", "%j").stdout.split())

    def end(self, name: str) -> None:
        assert self.cluster.command("scancel", f"--name={name}").returncode == 0

    def refusing(self) -> tuple[Operator, str]:
        return self.operator(partition="nowhere"), "Invalid partition name"

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.cluster.controller.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.cluster.controller.send_signal(signal.SIGCONT)


class KubernetesProvider:
    outlives_launcher = True

    def __init__(self, api: KubeApi, directory: Path) -> None:
        self.api, self.directory = api, directory
        self.kubeconfig = api.write_kubeconfig(directory / "kubeconfig")
        self.template = directory / "pod.yaml"
        self.template.write_text(POD)

    def operator(self, job: str = JOB, **settings: Any) -> KubernetesOperator:
        here = {"pod_template": str(self.template), "namespace": NAMESPACE, "kubeconfig": str(self.kubeconfig)}
        return KubernetesOperator({**here, "poll_s": 0.01, **settings}, job_access(self.directory, job))

    def living(self) -> set[str]:
        return self.api.living()

    def end(self, name: str) -> None:
        self.api.remove(name)

    def refusing(self) -> tuple[Operator, str]:
        self.api.refusals.append(("POST", "pods", 403, "exceeded quota: pods=10"))
        return self.operator(), "exceeded quota"

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.api.stop()
        try:
            yield
        finally:
            self.api.start()


class AwsProvider:
    outlives_launcher = True

    def __init__(self, cloud: AwsCloud, directory: Path) -> None:
        self.cloud, self.directory = cloud, directory

    def operator(self, job: str = JOB, **settings: Any) -> AwsOperator:
        here = {"group": self.cloud.name, "region": REGION, "poll_s": 0.01}
        return AwsOperator({**here, **settings}, job_access(self.directory, job))

    def living(self) -> set[str]:
        return self.cloud.living()

    def end(self, name: str) -> None:
        self.cloud.ec2.terminate_instances(InstanceIds=[name])

    def refusing(self) -> tuple[Operator, str]:
        self.cloud.update(MaxSize=0)
        return self.operator(), "its MaxSize is 0"

    def away(self) -> contextlib.AbstractContextManager[None]:
        return self.cloud.away()


class ProcessProvider:
    """This host: machines are children, and end with their launcher."""

    outlives_launcher = False

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory = kind, directory
        self._others = set(children_of(os.getpid()))
        self._pids: dict[str, int] = {}
        self._operators: list[Operator] = []

    def operator(self, job: str = JOB, command: str = "sleep 600 # {agent}") -> Operator:
        access = job_access(self.directory, job)
        keep = {"keep": lambda: self._others}
        if self.kind == "local":
            made: Operator = LocalOperator(access, **keep)
        else:
            made = CommandOperator({"command": command}, access, **keep)
        self._operators.append(made)
        return made

    def living(self) -> set[str]:
        for operator in self._operators:
            self._pids |= {machine.name: machine.pid for machine in operator.machines() if machine.pid is not None}
        return {name for name, pid in self._pids.items() if start_time(pid) is not None}

    def end(self, name: str) -> None:
        assert name in self.living()
        os.kill(self._pids[name], signal.SIGKILL)
        assert not wait_gone([self._pids[name]], 10)


def short_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lg-")
