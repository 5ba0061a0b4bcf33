"""Machines that are processes of this host: one agent each, which can be killed for real."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from lightning_gemini.controlplane.operators.base import JobAccess, Machine
from lightning_gemini.controlplane.operators.children import ChildMachines
from lightning_gemini.controlplane.operators.domains import next_domain
from lightning_gemini.controlplane.operators.shared_imports import SharedImports
from lightning_gemini.errors import OperatorError


class LocalOperator:
    """Starts agents as children of this process, from its main thread; they die with it.

    Args:
        access: The job.
        keep: Returns the children of this process that are no machines.
        domains: Failure domain of each machine, repeated.
        template: Socket of a process that imports for all machines; without one each imports for itself.
        modules: What it imports.
    """

    def __init__(
        self,
        access: JobAccess,
        *,
        keep: Callable[[], Collection[int]] = tuple,
        domains: Sequence[str] = (),
        template: Path | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        self._access, self._domains = access, domains
        self._imports = SharedImports(access, template, modules)
        self._children = ChildMachines(access, lambda: {*keep(), *self._imports.pids})
        self._started = 0
        self._domain_of: dict[str, str] = {}

    def start_machine(self) -> None:
        """See `Operator.start_machine`."""
        self._imports.start()
        name = f"machine-{self._started}"
        domain = next_domain(self._domains, self._domain_of.values())
        try:
            self._children.start(
                name,
                [*self._access.command(), "--name", name, "--parent", str(os.getpid())],
                {"LIGHTNING_GEMINI_DOMAIN": domain} if domain else {},
            )
        except OSError as error:
            raise OperatorError(f"cannot start an agent on this machine ({error})") from error
        self._started += 1
        self._domain_of[name] = domain

    def machines(self) -> list[Machine]:
        """See `Operator.machines`."""
        return self._children.machines()

    def destroy_machine(self, name: str) -> None:
        """See `Operator.destroy_machine`; also ends what the agent's death left behind on that machine."""
        self._children.destroy(name)
        self._domain_of.pop(name, None)

    def close(self) -> None:
        """See `Operator.close`."""
        self._children.close()
        self._imports.close()
