"""What all machines of a job must know, whoever provides them: the launcher writes it to the store first."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.config import ClusterConfig

_DEFAULT = ClusterConfig()


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What all machines of a job must know.

    Attributes:
        nodes: Machines of the job, standbys not counted.
        nproc_per_node: Workers on each machine.
        script: The user's script and its arguments.
        run_dir: The run's directory.
        preload: Modules that warm pools import on top of the usual ones.
        template: Socket of the host's import template, if it has one.
        lease_ttl_s: Seconds of silence after which a machine counts as dead.
        max_failures: Recoveries in a row without a new completed step before the job is given up.
        stop_timeout_s: Seconds that workers get to end once killed.
        report_timeout_s: Seconds that an agent gets to answer a ``report`` order before its machine is given up.
        proof: `proof_of` the job's secret, by which an agent sees that it was given the right one; empty: not checked.
    """

    nodes: int
    nproc_per_node: int
    script: tuple[str, ...]
    run_dir: Path
    preload: tuple[str, ...] = ()
    template: Path | None = None
    lease_ttl_s: int = _DEFAULT.lease_ttl_s
    max_failures: int = _DEFAULT.max_failures_without_progress
    stop_timeout_s: float = _DEFAULT.stop_timeout_s
    report_timeout_s: float = _DEFAULT.report_timeout_s
    proof: str = ""

    def to_json(self) -> str:
        """Writes it."""
        return json.dumps(asdict(self), default=str)


def spec_from_json(text: str) -> JobSpec:
    """Reads it."""
    fields: dict[str, Any] = json.loads(text)
    fields["run_dir"] = Path(fields["run_dir"])
    fields["template"] = Path(fields["template"]) if fields["template"] else None
    for name in ("script", "preload"):
        fields[name] = tuple(fields[name])
    return JobSpec(**fields)


def proof_of(secret: bytes, job: str) -> str:
    """Returns what only someone who knows the secret can compute, and what tells nobody the secret."""
    return hmac.new(secret, f"lightning-gemini job {job}".encode(), hashlib.sha256).hexdigest()
