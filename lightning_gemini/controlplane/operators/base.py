"""What the launcher asks of whoever provides machines."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightning_gemini.errors import OperatorError

__all__ = ["JobAccess", "Machine", "MachineState", "Operator", "OperatorError"]


class MachineState(enum.Enum):
    """What its provider says about a machine."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine as its provider sees it.

    Attributes:
        name: Unique among all machines that this operator ever started; what its agent calls itself.
        state: Asked for, there, or gone.
        pid: Process id of the agent, where the operator is its parent.
        returncode: How the agent ended, as `subprocess` counts (negative: the signal), where that is known.
        detail: What the provider says about it, for people.
    """

    name: str
    state: MachineState
    pid: int | None = None
    returncode: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class JobAccess:
    """All that an agent must know to join a job.

    Attributes:
        job: The job's id.
        etcd: Comma-separated ``HOST:PORT`` of the key-value store.
        secret_file: File with the job's secret, in hexadecimal.
        run_dir: The run's directory.
        lease_ttl_s: Seconds of silence after which a machine counts as dead.
        stop_timeout_s: Seconds that agents get to end by themselves.
    """

    job: str
    etcd: str
    secret_file: Path
    run_dir: Path
    lease_ttl_s: int
    stop_timeout_s: float

    def environment(self) -> dict[str, str]:
        """Returns the variables that ``lightning-gemini agent`` reads; the secret itself is among them."""
        return {
            "LIGHTNING_GEMINI_JOB": self.job,
            "LIGHTNING_GEMINI_ETCD": self.etcd,
            "LIGHTNING_GEMINI_SECRET": self.secret_file.read_text().strip(),
        }

    def command(self) -> list[str]:
        """Returns the command line of an agent, for the interpreter and the file system of this host."""
        where = ["--job", self.job, "--etcd", self.etcd, "--secret-file", str(self.secret_file)]
        return [sys.executable, "-m", "lightning_gemini.cli", "agent", *where]


class Operator(Protocol):
    """Provides machines with an agent on them; which slot a machine gets is the root's business."""

    def start_machine(self) -> None:
        """Asks for one more machine; returns at once.

        Raises:
            OperatorError: If the provider refuses, or cannot be reached now.
        """

    def machines(self) -> list[Machine]:
        """Returns all machines that were asked for and not yet destroyed, in that order; ended ones too.

        Raises:
            OperatorError: If the provider cannot be reached now.
        """

    def destroy_machine(self, name: str) -> None:
        """Ends a machine without asking it; afterwards it is not listed; idempotent.

        Raises:
            OperatorError: If the provider cannot be reached now.
        """

    def close(self) -> None:
        """Ends all machines, gently first; bounded in time; idempotent."""
