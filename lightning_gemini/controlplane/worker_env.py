"""The environment of one worker: what torchrun sets, so that every framework recognises it, plus where its agent is."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Where the workers of one machine and generation stand in the job."""

    job: str
    machine: int
    nodes: int
    nproc_per_node: int
    generation: int
    max_failures: int
    master_addr: str
    master_port: int
    agent_socket: Path
    run_dir: Path
    name: str = ""
    domain: str = ""
    interface: str | None = None

    def rank(self, local_rank: int) -> int:
        """Global rank of a local one."""
        return self.machine * self.nproc_per_node + local_rank

    def environment(self, local_rank: int) -> dict[str, str]:
        """Returns the variables of one worker."""
        rank, world_size = str(self.rank(local_rank)), str(self.nodes * self.nproc_per_node)
        return {
            "RANK": rank,
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": str(self.nproc_per_node),
            "GROUP_RANK": str(self.machine),
            "GROUP_WORLD_SIZE": str(self.nodes),
            "ROLE_RANK": rank,
            "ROLE_NAME": "default",
            "ROLE_WORLD_SIZE": world_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RUN_ID": self.job,
            "TORCHELASTIC_RESTART_COUNT": str(self.generation - 1),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_failures),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "LIGHTNING_GEMINI_AGENT": str(self.agent_socket),
            "LIGHTNING_GEMINI_JOB": self.job,
            "LIGHTNING_GEMINI_GENERATION": str(self.generation),
            "LIGHTNING_GEMINI_NODE": str(self.machine),
            "LIGHTNING_GEMINI_RUN_DIR": str(self.run_dir),
            "LIGHTNING_GEMINI_MACHINE": self.name,
            "LIGHTNING_GEMINI_DOMAIN": self.domain,
            **self._interfaces(),
        }

    def _interfaces(self) -> dict[str, str]:
        """Left alone, libraries may pick an interface that no other machine can reach; the user's own word wins."""
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        return {name: self.interface for name in names if self.interface and name not in os.environ}

    def log_path(self, local_rank: int) -> Path:
        """File of the worker's standard output and error; later generations append to it."""
        return self.run_dir / "logs" / f"node{self.machine}-rank{self.rank(local_rank)}.out"


class PortReservation:
    """Keeps a free TCP port free until the next one is asked for.

    The socket is bound but does not listen, and shares its address: a worker that sets ``SO_REUSEADDR``, as torch does,
    can listen there, while the kernel gives the port to nobody else.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def renew(self) -> int:
        """Gives the last port back and returns a new one."""
        fresh = socket.socket()
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        fresh.bind(("", 0))
        self.close()
        self._socket = fresh
        return int(fresh.getsockname()[1])

    def close(self) -> None:
        """Gives the port back."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
