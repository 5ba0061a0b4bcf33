"""Machines that are processes of this host: one agent each, which can be killed for real."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.operators.base import Machine
from lightning_gemini.controlplane.processes import (
    PROTOBUF_VARIABLE,
    adopt_orphans,
    children_of,
    environment_of,
    kill_group,
)
from lightning_gemini.controlplane.warm_pool import pool_environment


class LocalOperator:
    """Starts agents as children of this process, from its main thread; they die with it.

    Args:
        run_dir: The run's directory.
        settings: Fields of `WorkerAgentSettings` that all machines share, JSON-able, with ``secret_file``.
        sockets: Each slot's agent socket.
        stop_timeout_s: Seconds that agents get to end by themselves.
    """

    def __init__(
        self, run_dir: Path, settings: Mapping[str, Any], sockets: Mapping[int, Path], stop_timeout_s: float
    ) -> None:
        self._run_dir, self._settings, self._sockets = run_dir, settings, sockets
        self._stop_timeout_s = stop_timeout_s
        self._agents: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self._template: subprocess.Popen[bytes] | None = None
        self.keep: set[int] = set()  # children of this process that are not machines
        adopt_orphans()

    def start_template(self, path: Path, modules: Sequence[str]) -> None:
        """Starts the process that imports for all machines; without it each imports for itself."""
        command = [sys.executable, "-m", "lightning_gemini.controlplane.template", "--socket", str(path)]
        with (self._run_dir / "logs" / "template.out").open("ab") as output:
            self._template = subprocess.Popen(
                [*command, "--parent", str(os.getpid()), *modules],
                env=pool_environment({**os.environ, "LIGHTNING_GEMINI_JOB": self._settings["job"]}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.keep.add(self._template.pid)
        while not path.exists() and self._template.poll() is None:
            time.sleep(0.01)

    def start_machine(self, slot: int) -> Machine:
        """See `Operator.start_machine`."""
        incarnation = secrets.token_hex(4)
        directory = self._run_dir / "nodes" / str(slot)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fields = {**self._settings, "machine": slot, "incarnation": incarnation}
        config = directory / "agent.json"
        config.write_text(json.dumps({**fields, "socket_path": str(self._sockets[slot])}, indent=1))
        command = [sys.executable, "-m", "lightning_gemini.controlplane.agent_main", "--config", str(config)]
        with (self._run_dir / "logs" / f"node{slot}-agent.out").open("ab") as output:
            agent = subprocess.Popen(
                [*command, "--parent", str(os.getpid())],
                env=self._environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._agents[slot] = incarnation, agent
        return Machine(slot, incarnation, agent.pid, None)

    def machines(self) -> list[Machine]:
        """See `Operator.machines`."""
        return [
            Machine(slot, incarnation, agent.pid, agent.poll())
            for slot, (incarnation, agent) in sorted(self._agents.items())
        ]

    def destroy_machine(self, slot: int) -> None:
        """See `Operator.destroy_machine`; also ends what the agent's death left behind on that machine."""
        _, agent = self._agents[slot]
        if agent.poll() is None:
            kill_group(agent.pid)
            agent.wait()
        mark = {name: self._environment(slot)[name] for name in ("LIGHTNING_GEMINI_JOB", "LIGHTNING_GEMINI_NODE")}
        self._end_orphans(mark)

    def close(self) -> None:
        """See `Operator.close`."""
        agents = [agent for _, agent in self._agents.values()]
        for agent in agents:
            agent.terminate()
        deadline = time.monotonic() + self._stop_timeout_s
        for agent in agents:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(max(0.0, deadline - time.monotonic()))
        for process in [*agents, *([self._template] if self._template else [])]:
            process.kill()
            process.wait()
        self._end_orphans({})
        for path in self._sockets.values():
            path.unlink(missing_ok=True)

    def _environment(self, slot: int) -> dict[str, str]:
        """Also marks everything that is ever started on the machine, so that it can be found."""
        inherited = {name: value for name, value in os.environ.items() if name != PROTOBUF_VARIABLE}
        return {**inherited, "LIGHTNING_GEMINI_JOB": self._settings["job"], "LIGHTNING_GEMINI_NODE": str(slot)}

    def _end_orphans(self, mark: Mapping[str, str]) -> None:
        """SIGKILLs adopted processes that carry ``mark``, and their children as they come up; within two seconds."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and (orphans := self._orphans(mark)):
            for pid in orphans:
                kill_group(pid)
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)

    def _orphans(self, mark: Mapping[str, str]) -> list[int]:
        known = self.keep | {agent.pid for _, agent in self._agents.values()}
        adopted = [pid for pid in children_of(os.getpid()) if pid not in known]
        # A dead one has no environment left to read, and only waits to be reaped.
        return [pid for pid in adopted if not mark or _carries(environment_of(pid), mark)]


def _carries(environment: Mapping[str, str], mark: Mapping[str, str]) -> bool:
    return not environment or all(environment.get(name) == value for name, value in mark.items())
