"""The launcher's own reconcile logic, on an operator that boots simulated machines."""

from __future__ import annotations

import itertools
from typing import Any

from lightning_gemini.controlplane.job_view import JobView
from lightning_gemini.controlplane.operators.base import Machine, MachineState
from lightning_gemini.controlplane.reconcile import JobEnd, Reconciler
from lightning_gemini.errors import OperatorError
from tests.simulation.key_value import SimulatedKeyValueStore
from tests.simulation.scheduler import Active
from tests.simulation.threads import SimpleQueue

_POLL_S = 0.1


class SimulatedOperator:
    """Provides machines after a random while; now and then its provider refuses."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._machines: dict[str, Any] = {}
        self._names = (f"machine-{number}" for number in itertools.count())
        self._dice = cluster.scheduler.random

    def start_machine(self) -> None:
        if self._dice.random() < min(0.02, 0.2 / self._cluster.parameters.machines):
            raise OperatorError("no machine is free: try again later")
        machine = self._cluster.new_machine(next(self._names))
        machine.agent = None
        self._machines[machine.name] = machine
        delay_s = self._cluster.parameters.machine_boot_s * (0.3 + self._dice.random() * 1.4)
        self._cluster.scheduler.call(delay_s, self._boot, machine)

    def _boot(self, machine: Any) -> None:
        if not machine.silent:
            machine.agent = self._cluster.start_agent(machine)

    def machines(self) -> list[Machine]:
        return [self._described(machine) for machine in self._machines.values()]

    def destroy_machine(self, name: str) -> None:
        machine = self._machines.pop(name, None)
        if machine is not None:
            self._cluster.lose([machine], silent=self._dice.random() < 0.5)

    def close(self) -> None:
        for machine in self._machines.values():
            machine.power_off(silent=True)

    @staticmethod
    def _described(machine: Any) -> Machine:
        if machine.agent is None:
            return Machine(machine.name, MachineState.ENDED if machine.silent else MachineState.PENDING)
        code = machine.agent.exit_code
        return Machine(
            machine.name, MachineState.RUNNING if code is None else MachineState.ENDED, machine.agent.pid, code
        )


class SimulatedLauncher:
    """The process that keeps the job's machines alive, and sees how it ends.

    Attributes:
        end: How the job ended; None while it runs.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.end: JobEnd | None = None

    def start(self) -> None:
        machine = self._cluster.new_machine("launcher")
        machine.start("launcher", self._run, {}, None)

    def _run(self) -> None:
        """The loop of `Launcher`, without a terminal and an etcd to look after."""
        cluster, parameters = self._cluster, self._cluster.parameters
        view, changes = JobView(cluster.keys), SimpleQueue()
        SimulatedKeyValueStore(cluster.store).watch_prefix(cluster.keys.prefix, changes.put)
        reconciler = Reconciler(SimulatedOperator(cluster), view, parameters.lease_ttl_s)
        while self.end is None:
            while not changes.empty():
                for change in changes.get():
                    view.take(change)
            if view.result is not None:
                success = bool(view.result["success"])
                self.end = JobEnd(success, view.result["reason"], 0 if success else 1)
            else:
                self.end = reconciler.step(parameters.machines + (parameters.standby if view.ordered else 0))
                Active.scheduler.sleep(_POLL_S)
        cluster.note(f"job ends: {self.end}")
