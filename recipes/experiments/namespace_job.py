"""A training job of one process a machine, on machines made of network namespaces; nothing of it outlives this process.

The strategy starts the machines' agents by itself, as it does without ``lightning-gemini run``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from launched import cpu_environment
from namespaces import Namespaces

from lightning_gemini.controlplane.processes import bound_command

_PORT = 29500  # every machine has all ports for itself
_END_S = 10.0
_FAILED_LINES = 25


class JobError(Exception):
    """The job failed; the message ends with what it said last."""


class NamespaceJob:
    """One job.

    Args:
        net: Its machines.
        folder: Its run directory, which exists.
        script: What every machine runs, with its arguments.
        priority: Niceness of its workers; below 0 they come before others.
    """

    def __init__(self, net: Namespaces, folder: Path, script: Sequence[str], *, priority: int = 0) -> None:
        self._net, self._folder, self._script, self._priority = net, folder, list(script), priority
        self._workers: list[subprocess.Popen[bytes]] = []
        self._prioritised: set[int] = set()
        self._sockets = ""

    def __enter__(self) -> NamespaceJob:
        # Agents' sockets need a short path.
        self._sockets = tempfile.mkdtemp(prefix="gemini-")
        try:
            for rank in range(len(self._net.names)):
                with self._log(rank).open("wb") as log:
                    self._workers.append(self._start(rank, log))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether some rank still trains.

        Raises:
            JobError: A rank failed.
        """
        codes = [worker.poll() for worker in self._workers]
        for rank, code in enumerate(codes):
            if code:
                raise JobError(f"rank {rank} failed with exit code {code}:\n{self._tail(rank)}")
        return None in codes

    def prioritise(self) -> None:
        """Has the priority of workers that are new count among sessions too, which kernels weigh against each other.

        Agents are in sessions of their own, and keep the usual one: on machines of their own they would find a
        processor that training does not use.
        """
        for pid in {worker.pid for worker in self._workers} - self._prioritised:
            self._prioritised.add(pid)
            with contextlib.suppress(OSError):  # a kernel without such groups, or a process that has ended
                Path(f"/proc/{pid}/autogroup").write_text(str(self._priority))

    def close(self) -> None:
        """Ends every process on the machines; idempotent."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._signal_all(number):
                self._wait_empty()
        for worker in self._workers:
            worker.wait()
        if self._sockets:
            shutil.rmtree(self._sockets, ignore_errors=True)

    def _start(self, rank: int, log: BinaryIO) -> subprocess.Popen[bytes]:
        program = self._net.command(rank, sys.executable, *self._script)
        program[0] = shutil.which(program[0]) or program[0]
        nice = [str(shutil.which("nice")), "-n", str(self._priority)] if self._priority else []
        return subprocess.Popen(
            bound_command([*nice, *program]),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=self._environment(rank),
            start_new_session=True,  # Ctrl-C is this process's business
        )

    def _environment(self, rank: int) -> dict[str, str]:
        name, world_size = f"{self._folder.name}-{os.getpid()}", str(len(self._net.names))
        return cpu_environment(
            RANK=str(rank),
            LOCAL_RANK="0",
            GROUP_RANK=str(rank),
            WORLD_SIZE=world_size,
            LOCAL_WORLD_SIZE="1",
            GROUP_WORLD_SIZE=world_size,
            MASTER_ADDR=self._net.address(0),
            MASTER_PORT=str(_PORT),
            TORCHELASTIC_RUN_ID=name,
            TORCHELASTIC_RESTART_COUNT="0",
            TORCHELASTIC_USE_AGENT_STORE="False",
            LIGHTNING_GEMINI_JOB=name,
            LIGHTNING_GEMINI_RUN_DIR=str(self._folder),
            TMPDIR=self._sockets,
            GLOO_SOCKET_IFNAME="eth0",
            OMP_NUM_THREADS="1",
        )

    def _signal_all(self, number: int) -> bool:
        """Says whether there was anybody."""
        pids = self._pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(pids)

    def _pids(self) -> list[int]:
        return [pid for index in range(len(self._net.names)) for pid in self._net.processes(index)]

    def _wait_empty(self) -> None:
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            for worker in self._workers:
                worker.poll()  # the dead are on the machines until somebody asks for them
            if not self._pids():
                return
            time.sleep(0.05)

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _tail(self, rank: int) -> str:
        return "\n".join(self._log(rank).read_text(errors="replace").splitlines()[-_FAILED_LINES:])
