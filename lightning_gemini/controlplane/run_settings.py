"""What the user asked ``lightning-gemini run`` for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gemini.config import ClusterConfig
from lightning_gemini.controlplane.kv.etcd import reachable
from lightning_gemini.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What the user asked ``lightning-gemini run`` for.

    Attributes:
        script: The script to train.
        arguments: Its arguments.
        nodes: Machines of the job.
        nproc_per_node: Workers on each.
        standby: Machines that stand by on top of them.
        run_dir: The run's directory; None: a new one below ``runs/``.
        etcd: Comma-separated ``HOST:PORT`` of a running etcd; None: start one.
        etcd_members: Members of the etcd that is started, 1 or 3.
        host: Address of this host at which that etcd listens.
        preload: Modules that warm pools import on top of the usual ones.
        operator: Who provides machines.
        operator_settings: That operator's own settings.
        domains: Failure domain of each machine, repeated; empty: unknown.
        cluster: How machines watch each other.
    """

    script: Path
    arguments: tuple[str, ...] = ()
    nodes: int = 1
    nproc_per_node: int = 1
    standby: int = 0
    run_dir: Path | None = None
    etcd: str | None = None
    etcd_members: int = 1
    host: str = "127.0.0.1"
    preload: tuple[str, ...] = ()
    operator: str = "local"
    operator_settings: Mapping[str, Any] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            ConfigurationError: With what to do about it.
        """
        for name, value, least in (
            ("--local-nodes", self.nodes, 1),
            ("--nproc-per-node", self.nproc_per_node, 1),
            ("--standby", self.standby, 0),
            ("--max-failures", self.cluster.max_failures_without_progress, 0),
        ):
            if value < least:
                raise ConfigurationError(f"{name} must be {least} or more, got {value}")
        if self.etcd_members not in (1, 3):
            raise ConfigurationError(f"--etcd-members must be 1 or 3, got {self.etcd_members}")
        if len(self.domains) > self.nodes + self.standby:
            machines = self.nodes + self.standby
            raise ConfigurationError(
                f"--domains names {len(self.domains)} machines, the job has {machines}: give one for each"
            )
        if self.host in ("", "0.0.0.0", "::"):  # noqa: S104 - refused
            raise ConfigurationError(f"--host must be an address at which machines reach this host, got {self.host!r}")
        if not self.script.is_file():
            raise ConfigurationError(f"there is no script {self.script}: give the path of a Python file")
        if self.etcd is not None and (trouble := reachable(self.etcd)) is not None:
            raise ConfigurationError(f"no etcd answers at {self.etcd} ({trouble}): start it, or leave --etcd out")

    @property
    def command(self) -> tuple[str, ...]:
        """The script with its arguments."""
        return (str(self.script), *self.arguments)

    def slot_domains(self) -> list[str]:
        """Returns the failure domain of every slot: the root hands slots out in the domains' order."""
        return sorted(self.domains[index % len(self.domains)] for index in range(self.nodes)) if self.domains else []
