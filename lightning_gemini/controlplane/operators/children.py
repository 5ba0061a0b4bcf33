"""Machines whose agent is a descendant of this process: started, watched, and ended with all that they left behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from lightning_gemini.controlplane.operators.base import JobAccess, Machine, MachineState
from lightning_gemini.controlplane.processes import (
    PROTOBUF_VARIABLE,
    adopt_orphans,
    children_of,
    environment_of,
    kill_group,
)

_ORPHANS_S = 2.0


class ChildMachines:
    """Processes of this host that stand for a machine each; all methods are called on the process's main thread.

    Args:
        access: The job.
        keep: Returns the children of this process that are no machines.
    """

    def __init__(self, access: JobAccess, keep: Callable[[], Collection[int]]) -> None:
        self._access, self._keep = access, keep
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        adopt_orphans()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts a machine's process; its output goes to ``logs/<name>-agent.out``.

        Raises:
            OSError: If there is no such program.
        """
        with (self._access.run_dir / "logs" / f"{name}-agent.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command,
                env={**_inherited(), **environment, **self._marks(name)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def machines(self) -> list[Machine]:
        """See `Operator.machines`."""
        return [self._machine(name, process) for name, process in self._processes.items()]

    def destroy(self, name: str) -> None:
        """Ends a machine's process, and what its death left behind."""
        process = self._processes.get(name)
        if process is not None:
            if process.poll() is None:
                kill_group(process.pid)
                process.wait()
            self._end_orphans(self._marks(name))
            del self._processes[name]

    def close(self) -> None:
        """Ends all of them, gently first."""
        processes = list(self._processes.values())
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + self._access.stop_timeout_s + 3.0
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in processes:
            kill_group(process.pid)
            process.wait()
        self._processes.clear()
        self._end_orphans({"LIGHTNING_GEMINI_JOB": self._access.job})

    def _machine(self, name: str, process: subprocess.Popen[bytes]) -> Machine:
        code = process.poll()
        state = MachineState.RUNNING if code is None else MachineState.ENDED
        return Machine(name, state, process.pid, code, f"see logs/{name}-agent.out")

    def _marks(self, name: str) -> dict[str, str]:
        """Variables by which everything that is ever started on the machine can be found."""
        return {"LIGHTNING_GEMINI_JOB": self._access.job, "LIGHTNING_GEMINI_MACHINE": name}

    def _end_orphans(self, marks: Mapping[str, str]) -> None:
        """SIGKILLs adopted processes that carry ``marks``, and their children as they come up; within two seconds."""
        deadline = time.monotonic() + _ORPHANS_S
        while time.monotonic() < deadline and (orphans := self._orphans(marks)):
            for pid in orphans:
                kill_group(pid)
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)

    def _orphans(self, marks: Mapping[str, str]) -> list[int]:
        known = {*self._keep(), *(process.pid for process in self._processes.values())}
        adopted = [pid for pid in children_of(os.getpid()) if pid not in known]
        # A dead one has no environment left to read, and only waits to be reaped.
        return [pid for pid in adopted if _carries(environment_of(pid), marks)]


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != PROTOBUF_VARIABLE}


def _carries(environment: Mapping[str, str], marks: Mapping[str, str]) -> bool:
    return not environment or all(environment.get(name) == value for name, value in marks.items())
