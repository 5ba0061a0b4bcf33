"""Agents for the tests: in this process with real sockets, or as real processes that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.agent import AgentSettings, MachineAgent
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.controlplane.processes import start_time, wait_gone
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer, Slab
from tests.dataplane.machines import write_version
from tests.dataplane.waiting import wait_until

JOB = "a-job"
SECRET = b"known to agents alone"
ROOT = Path(__file__).parents[2]


class ShortDirectory:
    """A directory of its own whose paths are short enough for unix sockets."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lg-"))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def make_agent(directory: Path, machine: int = 0, **fields: Any) -> MachineAgent:
    settings = {"job": JOB, "machine": machine, "socket_path": directory / f"{machine}.sock", "secret": SECRET}
    return MachineAgent(AgentSettings(**{**settings, **fields}))


def introduce(agents: Sequence[MachineAgent], generation: int = 1, nproc: int = 1) -> None:
    addresses = [agent.replica_address for agent in agents]
    for agent in agents:
        agent.set_peers(generation, nproc, addresses)


class Worker:
    """What a rank does with its agent, without training."""

    def __init__(self, agent: MachineAgent, rank: int, *, replicas: int = 2, size: int = 5000) -> None:
        self.rank, self.size = rank, size
        self.client = AgentClient(agent.settings.socket_path, JOB)
        self.client.join(rank, replicas, "mixed")
        self.slab: Slab = self.client.attach(size)

    def publish(self, number: int, generation: int = 1) -> Buffer:
        newest = self.slab.newest_started()
        buffer = self.slab.buffers[1] if newest is self.slab.buffers[0] else self.slab.buffers[0]
        self.client.notify()
        write_version(buffer, VersionId(generation, number), self.size)
        self.client.notify()
        return buffer

    def commit(self, number: int, generation: int = 1) -> None:
        buffer = self.publish(number, generation)
        wait_until(lambda: buffer.acked == VersionId(generation, number), f"version {number} is acknowledged")

    def close(self) -> None:
        self.client.close()
        self.slab.close()


class AgentProcess:
    """A standalone agent that was found or started; ended without mercy when the test is over."""

    def __init__(self, client: AgentClient) -> None:
        self.pid = int(client.identity["pid"])
        self.started = start_time(self.pid)

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started

    def kill(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
        assert not wait_gone([self.pid], 10.0)
        self.reap()

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # another process started it
            os.waitpid(self.pid, 0)


def start_process(socket_path: Path, **fields: Any) -> subprocess.Popen[bytes]:
    """Start a standalone agent the hard way, and do not wait for it."""
    settings = {"job": JOB, "machine": 0, "socket_path": str(socket_path), "secret": SECRET.hex(), **fields}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_gemini.controlplane.standalone"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(settings).encode())
    process.stdin.close()
    process.stdin = None
    return process


def memfd_of(buffer: Buffer) -> tuple[int, int]:
    """What identifies the memory behind a buffer in every process."""
    status = os.fstat(buffer.fd)
    return status.st_dev, status.st_ino


def users_of(memfd: tuple[int, int]) -> set[int]:
    """Processes that have this memory open or mapped."""
    return {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and uses(int(pid), memfd)}


def uses(pid: int, memfd: tuple[int, int]) -> bool:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                status = descriptor.stat()
                if (status.st_dev, status.st_ino) == memfd:
                    return True
        maps = Path(f"/proc/{pid}/maps").read_text()
        return any(
            line.split()[4:5] == [str(memfd[1])] and "memfd:lightning-gemini" in line for line in maps.splitlines()
        )
    return False
