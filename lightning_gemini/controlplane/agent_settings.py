"""What an agent process is started with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class WorkerAgentSettings:
    """What an agent process is started with.

    Attributes:
        job: The job's id.
        machine: This machine's rank (slot).
        nodes: Machines of the job.
        nproc_per_node: Workers on each machine.
        script: The user's script and its arguments.
        run_dir: The run's directory.
        socket_path: Where workers find the agent.
        secret: What agents of this job know.
        etcd: ``HOST:PORT`` of the key-value store.
        incarnation: Name of this very process.
        host: Address that peers and workers of other machines reach this one at.
        preload: Modules that the warm pool imports on top of the usual ones.
        template: Socket of the host's import template, if it has one.
        lease_ttl_s: Seconds of silence after which this machine counts as dead.
        max_failures: Recoveries in a row without a new completed step before the job is given up.
        stop_timeout_s: Seconds that workers get to end once killed.
    """

    job: str
    machine: int
    nodes: int
    nproc_per_node: int
    script: tuple[str, ...]
    run_dir: Path
    socket_path: Path
    secret: bytes
    etcd: str
    incarnation: str
    host: str = "127.0.0.1"
    preload: tuple[str, ...] = ()
    template: Path | None = None
    lease_ttl_s: int = 2
    max_failures: int = 3
    stop_timeout_s: float = 5.0


def load_settings(path: Path) -> WorkerAgentSettings:
    """Reads what the launcher wrote; the secret is in a file of its own."""
    fields: dict[str, Any] = json.loads(path.read_text())
    fields["secret"] = bytes.fromhex(Path(fields.pop("secret_file")).read_text())
    for name in ("run_dir", "socket_path"):
        fields[name] = Path(fields[name])
    fields["template"] = Path(fields["template"]) if fields["template"] else None
    for name in ("script", "preload"):
        fields[name] = tuple(fields[name])
    return WorkerAgentSettings(**fields)
