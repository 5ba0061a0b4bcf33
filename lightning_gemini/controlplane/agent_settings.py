"""What an agent process is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_gemini.controlplane.job_spec import JobSpec
from lightning_gemini.controlplane.run_directory import machine_socket

EXIT_FENCED = 75
"""Exit code of an agent whose slot went to another one while nobody could hear it."""


@dataclass(frozen=True, slots=True)
class WorkerAgentSettings:
    """What an agent process is started with.

    Attributes:
        job: The job's id.
        name: The machine's name, unique in the job.
        incarnation: Name of this very process.
        secret: What agents of this job know.
        spec: What all machines of the job know.
        run_dir: The run's directory, as this machine sees it.
        host: Address that peers and workers of other machines reach this one at.
        interface: Its network interface, where workers must be told; None on loopback.
        domain: The machine's failure domain; empty where unknown.
    """

    job: str
    name: str
    incarnation: str
    secret: bytes
    spec: JobSpec
    run_dir: Path
    host: str = "127.0.0.1"
    interface: str | None = None
    domain: str = ""

    @property
    def socket_path(self) -> Path:
        """Where this machine's workers find the agent."""
        return machine_socket(self.run_dir, self.job, self.name)
