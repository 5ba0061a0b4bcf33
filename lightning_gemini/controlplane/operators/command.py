"""Machines that the user's own command makes: a container, a network namespace, another host through ssh."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.operators.base import JobAccess, Machine
from lightning_gemini.controlplane.operators.children import ChildMachines
from lightning_gemini.controlplane.operators.domains import next_domain
from lightning_gemini.controlplane.operators.shared_imports import SharedImports
from lightning_gemini.controlplane.processes import identity_of
from lightning_gemini.errors import ConfigurationError, OperatorError

_log = logging.getLogger(__name__)
_DESTROY_TIMEOUT_S = 10.0
_SHELL_KILLED = range(129, 193)
"""Codes of a shell, or of docker, whose command was killed by a signal: 128 and its number."""
_SSH_LOST = 255


class CommandOperator:
    """Runs a shell command for every machine; the process is the machine: when it ends, the machine has ended.

    In the templates ``{agent}`` stands for the agent's command line, ``{name}`` for the machine's name, and ``{index}``
    for a number that counts up or, with a pool, the lowest that no machine has.

    Args:
        settings: ``command``: the template; ``destroy``: one that is run when a machine is destroyed, or None;
            ``pool``: how many numbers there are, or None; ``shared_imports``: see ``template``.
        access: The job.
        keep: Returns the children of this process that are no machines.
        domains: Failure domain of each machine, repeated.
        template: With ``shared_imports``: socket of a process that imports for all machines.
        modules: What it imports.

    Raises:
        ConfigurationError: If the template starts no agent.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        access: JobAccess,
        *,
        keep: Callable[[], Collection[int]] = tuple,
        domains: Sequence[str] = (),
        template: Path | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        self._command, self._destroy = str(settings["command"]), settings.get("destroy")
        self._pool = settings.get("pool")
        if "{agent}" not in self._command:
            raise ConfigurationError(
                f"operator command: {{agent}} must stand where the agent is to be started, got {self._command!r}"
            )
        if self._pool is not None and int(self._pool) < 1:
            raise ConfigurationError(f"operator command: pool must be 1 or more, got {self._pool}")
        self._access, self._domains = access, domains
        self._imports = SharedImports(access, template if settings.get("shared_imports") else None, modules)
        self._children = ChildMachines(access, lambda: {*keep(), *self._imports.pids})
        self._started = 0
        self._index_of: dict[str, int] = {}
        self._domain_of: dict[str, str] = {}

    def start_machine(self) -> None:
        """See `Operator.start_machine`."""
        self._imports.start()
        name, index = f"machine-{self._started}", self._next_index()
        domain = next_domain(self._domains, self._domain_of.values())
        agent = [*self._access.command(), "--name", name, "--launcher", identity_of(os.getpid())]
        text = self._fill(self._command, name, index).replace("{agent}", shlex.join(agent))
        try:
            self._children.start(name, ["/bin/sh", "-c", text], {"LIGHTNING_GEMINI_DOMAIN": domain} if domain else {})
        except OSError as error:
            raise OperatorError(f"cannot run {text!r} ({error})") from error
        self._started += 1
        self._index_of[name], self._domain_of[name] = index, domain

    def machines(self) -> list[Machine]:
        """See `Operator.machines`."""
        return [replace(machine, returncode=_as_killed(machine.returncode)) for machine in self._children.machines()]

    def destroy_machine(self, name: str) -> None:
        """See `Operator.destroy_machine`."""
        self._children.destroy(name)
        self._domain_of.pop(name, None)
        index = self._index_of.pop(name, None)
        if index is not None and self._destroy:
            self._run_destroy(self._fill(str(self._destroy), name, index))

    def close(self) -> None:
        """See `Operator.close`."""
        self._children.close()
        for name in list(self._index_of):
            self.destroy_machine(name)
        self._imports.close()

    def _next_index(self) -> int:
        if self._pool is None:
            return self._started
        used = set(self._index_of.values())
        free = [index for index in range(int(self._pool)) if index not in used]
        if not free:
            raise OperatorError(f"all {self._pool} machines of the pool are in use: raise operator command's `pool`")
        return free[0]

    def _fill(self, template: str, name: str, index: int) -> str:
        return template.replace("{name}", name).replace("{index}", str(index))

    def _run_destroy(self, text: str) -> None:
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", text], stdin=subprocess.DEVNULL, capture_output=True, timeout=_DESTROY_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            _log.warning("%r did not end within %.0f s", text, _DESTROY_TIMEOUT_S)
            return
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-200:]
            _log.warning("%r ended with code %d: %s", text, done.returncode, said)


def _as_killed(code: int | None) -> int | None:
    """Tells a machine that was killed from one that ended by itself; how it ended may be unknown."""
    if code in _SHELL_KILLED:
        assert code is not None
        return 128 - code
    return None if code == _SSH_LOST else code
