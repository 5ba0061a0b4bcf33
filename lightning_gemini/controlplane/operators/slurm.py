"""Machines that are jobs of a Slurm cluster: one batch job each, which runs an agent until it ends."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gemini.controlplane.operators.base import JobAccess, Machine, MachineState
from lightning_gemini.controlplane.operators.listing import Listing
from lightning_gemini.controlplane.operators.settings import check_positive, read_settings
from lightning_gemini.controlplane.processes import PROTOBUF_VARIABLE
from lightning_gemini.errors import ConfigurationError, OperatorError

_log = logging.getLogger(__name__)

_FIELDS = ("JobID", "State", "exit_code", "Reason", "NodeList", "Name")
_PENDING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"})
_RUNNING = frozenset({"RUNNING", "RESIZING", "SIGNALING", "STOPPED", "SUSPENDED"})
_OWN_END = frozenset({"COMPLETED", "FAILED"})
"""The agent ended by itself; in any other state than these Slurm or a person ended it."""
_GONE = ("Invalid job id", "already completing or completed")


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """What ``conf/gemini/operator/slurm.yaml`` holds; see there.

    Attributes:
        partition: As `sbatch` takes it; None: the cluster's own.
        account: The same.
        time: The same; a machine whose time is up is replaced.
        gres: The same.
        exclusive: Whether a machine is a whole node, so that a lost node is one lost machine.
        extra: More arguments of `sbatch`.
        setup: Shell lines before the agent starts, such as ``module load``.
        python: Interpreter on the nodes that has this package; None: the one that runs here.
        output: File for what the agent prints, as `sbatch` takes it; None: beside the job's logs.
        poll_s: Seconds between two questions to Slurm.
        timeout_s: Seconds that one command of Slurm may take.
    """

    partition: str | None = None
    account: str | None = None
    time: str | int | None = None
    gres: str | None = None
    exclusive: bool = True
    extra: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: str | None = None
    output: str | None = None
    poll_s: float = 2.0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_positive("slurm", poll_s=self.poll_s, timeout_s=self.timeout_s)
        for name in ("extra", "setup"):
            if not isinstance(getattr(self, name), tuple):
                raise ConfigurationError(f"operator slurm: {name} must be a list, got {getattr(self, name)!r}")


class SlurmOperator:
    """Submits one job a machine, named ``gemini-<job>-<number>``; the agent gets the secret by its environment.

    What an earlier launcher of the same job left, and what was submitted though `sbatch` gave no answer, is found by
    its name and belongs to this one too.

    Args:
        settings: See `SlurmSettings`.
        access: The job.

    Raises:
        ConfigurationError: If a setting is impossible.
    """

    def __init__(self, settings: Mapping[str, Any], access: JobAccess) -> None:
        self._settings, self._access = read_settings(SlurmSettings, "slurm", settings), access
        self._prefix = f"gemini-{access.job}-"
        self._ids: dict[str, str] = {}  # of each machine, in order of request
        self._last: dict[str, Machine] = {}
        self._destroyed: set[str] = set()
        self._next: int | None = None
        self._listing = Listing(self._ask, self._settings.poll_s)

    def start_machine(self) -> None:
        """See `Operator.start_machine`."""
        if self._next is None:
            self._listing.get()  # so that a name of an earlier launcher is not used again
            self._next = 1 + max((_number(name) for name in self._ids), default=-1)
        name = f"{self._prefix}{self._next}"
        self._next += 1
        self._listing.forget()
        printed = self._call(self._submission(name), self._script(), self._environment(name))
        self._ids[name] = printed.strip().partition(";")[0]  # a federation adds the name of the cluster

    def machines(self) -> list[Machine]:
        """See `Operator.machines`."""
        return self._listing.get()

    def destroy_machine(self, name: str) -> None:
        """See `Operator.destroy_machine`."""
        number = self._ids.get(name)
        if number is None:
            return
        # A plain scancel lets the agent live for the cluster's KillWait; and the signal alone lets a waiting job wait.
        self._cancel(["--batch", "--signal=KILL", number])
        self._cancel([number])
        self._destroyed.add(name)
        del self._ids[name]
        self._listing.forget()

    def close(self) -> None:
        """See `Operator.close`; what cannot be ended is logged with the command that does it."""
        try:
            self._close_gently()
            for name in list(self._ids):
                self.destroy_machine(name)
        except OperatorError as error:
            left = " ".join(self._ids.values())
            _log.error("Slurm jobs of %s may be left (%s); end them with: scancel %s", self._access.job, error, left)

    def _close_gently(self) -> None:
        self._listing.forget()
        living = [self._ids[machine.name] for machine in self.machines() if machine.state is not MachineState.ENDED]
        if living:
            self._cancel(["--state=PENDING", *living])
            self._cancel(["--batch", "--signal=TERM", *living])
            self._listing.wait(_all_ended, self._access.stop_timeout_s)

    def _ask(self) -> list[Machine]:
        form = ",".join(f"{field}:|" for field in _FIELDS)
        command = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", f"--Format={form}"]
        told: dict[str, Machine] = {}
        for line in self._call(command).splitlines():
            number, machine = _parse(line)
            if machine.name.startswith(self._prefix) and machine.name not in self._destroyed:
                told[machine.name] = machine
                if machine.state is not MachineState.ENDED:
                    self._ids.setdefault(machine.name, number)
        return [self._current(name, told) for name in self._ids]

    def _current(self, name: str, told: Mapping[str, Machine]) -> Machine:
        """Slurm forgets a job some time after its end (MinJobAge)."""
        forgotten = self._last.get(name)
        if forgotten is None or forgotten.state is not MachineState.ENDED:
            forgotten = Machine(name, MachineState.ENDED, detail="Slurm does not know its job any more")
        self._last[name] = told.get(name, forgotten)
        return self._last[name]

    def _submission(self, name: str) -> list[str]:
        settings = self._settings
        output = settings.output or str(self._access.run_dir / "logs" / f"{name}.out")
        given = {key: getattr(settings, key) for key in ("partition", "account", "time", "gres")}
        command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={output}", "--open-mode=append"]
        command += ["--nodes=1", "--ntasks=1", "--no-requeue", "--export=ALL"]
        command += [f"--{key}={value}" for key, value in given.items() if value is not None]
        return [*command, *(["--exclusive"] if settings.exclusive else []), *map(str, settings.extra)]

    def _script(self) -> str:
        """The agent takes the place of the shell, so that signals reach it; its environment says what to join."""
        agent = shlex.join([self._settings.python or sys.executable, "-m", "lightning_gemini.cli", "agent"])
        return "\n".join(["#!/bin/bash", *map(str, self._settings.setup), f"exec {agent}", ""])

    def _environment(self, name: str) -> dict[str, str]:
        """Without what an allocation that the launcher itself runs in would impose on the machine."""
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key != PROTOBUF_VARIABLE and (not key.startswith("SLURM_") or key in ("SLURM_CONF", "SLURM_JWT"))
        }
        return {**inherited, **self._access.environment(), "LIGHTNING_GEMINI_MACHINE": name}

    def _cancel(self, arguments: Sequence[str]) -> None:
        try:
            self._call(["scancel", *arguments])
        except OperatorError as error:
            if not any(words in str(error) for words in _GONE):
                raise

    def _call(self, command: Sequence[str], text: str = "", environment: Mapping[str, str] | None = None) -> str:
        timeout_s = self._settings.timeout_s
        try:
            done = subprocess.run(
                command, input=text, env=environment, capture_output=True, text=True, timeout=timeout_s
            )
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"there is no {command[0]} on this host: run where Slurm's commands are"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise OperatorError(f"Slurm gave no answer to {command[0]} within {timeout_s:.0f} s") from error
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-500:]
            raise OperatorError(f"Slurm refused {command[0]} (code {done.returncode}): {said}")
        return done.stdout


def _parse(line: str) -> tuple[str, Machine]:
    number, state, status, reason, nodes, name = line.rstrip().removesuffix("|").split("|", len(_FIELDS) - 1)
    own_end = state in _OWN_END or reason == "NonZeroExitCode"  # which Slurm tells while the job is COMPLETING, too
    code = _returncode(int(status)) if own_end and status.isdecimal() else None
    detail = f"Slurm job {number} {state}" + (f" on {nodes}" if nodes else "")
    return number, Machine(name, _state(state), returncode=code, detail=f"{detail} ({reason})")


def _state(state: str) -> MachineState:
    if state in _PENDING:
        return MachineState.PENDING
    return MachineState.RUNNING if state in _RUNNING else MachineState.ENDED


def _returncode(status: int) -> int:
    """From what ``wait`` returns, which Slurm shows, to how `subprocess` counts."""
    return os.waitstatus_to_exitcode(status)


def _number(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _all_ended(machines: Sequence[Machine]) -> bool:
    return all(machine.state is MachineState.ENDED for machine in machines)
