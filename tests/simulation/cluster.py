"""A simulated cluster that runs one job: machines, store, launcher, and what they are to each other."""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.agent_settings import WorkerAgentSettings
from lightning_gemini.controlplane.events import EventLog
from lightning_gemini.controlplane.job_spec import JobSpec
from lightning_gemini.controlplane.membership import JobKeys
from lightning_gemini.controlplane.worker_agent import WorkerAgent
from lightning_gemini.core.placement import plan_placement
from tests.simulation.checks import Checks
from tests.simulation.collectives import Rendezvous
from tests.simulation.disk import Disk
from tests.simulation.key_value import KeyValueServer, SimulatedKeyValueStore
from tests.simulation.launching import SimulatedLauncher
from tests.simulation.network import Network
from tests.simulation.parameters import Parameters
from tests.simulation.processes import Machine, PortReservation, SimulatedWarmPool
from tests.simulation.scheduler import Fiber, Process, Scheduler, this_process
from tests.simulation.training import Program, Trainer

JOB = "simulated"
_TRACE_LINES = 600


class _Log:
    """Stands for the process's log file."""

    generation = 0


class Cluster:
    """Everything that a schedule runs on.

    Args:
        scheduler: The clock.
        parameters: What the schedule's seed says.
    """

    def __init__(self, scheduler: Scheduler, parameters: Parameters) -> None:
        self.scheduler, self.parameters = scheduler, parameters
        self.network = Network(scheduler, parameters.latency_s, parameters.bytes_per_s)
        self.store = KeyValueServer(scheduler, self.network)
        self.pool_boot_s = parameters.pool_boot_s
        self.trace: deque[str] = deque(maxlen=_TRACE_LINES)
        self.processes: dict[int, Process] = {}
        self.machines: dict[str, Machine] = {}
        self._hosts: dict[str, Machine] = {}
        self._pids, self._numbers, self._incarnations = itertools.count(1), itertools.count(1), itertools.count(1)
        self._spec = JobSpec(
            nodes=parameters.machines,
            nproc_per_node=parameters.nproc_per_machine,
            script=("train.py",),
            run_dir=Path("/simulated"),
            lease_ttl_s=parameters.lease_ttl_s,
            max_failures=10_000,
            report_timeout_s=parameters.report_timeout_s,
        )
        placement = plan_placement(parameters.machines, parameters.replicas, parameters.placement)
        self.checks = Checks(placement, parameters.nproc_per_machine, parameters.replicas, self.note)
        self.keys = JobKeys(JOB)
        self.store.observe = self._observe
        self.rendezvous = Rendezvous(lambda what: self.checks.violated(2, what))
        self.disk = Disk(parameters.disk_write_s)
        self.program = Program(parameters.config(), parameters.steps, parameters.step_s, parameters.persist_every_s)
        scheduler.died = self._thread_died
        self.launcher = SimulatedLauncher(self)

    def note(self, what: str) -> None:
        """Writes into the trace."""
        self.trace.append(f"{self.scheduler.now:9.4f}  {what}")

    def start(self) -> None:
        """Starts the job."""
        self.launcher.start()

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.launcher.end is not None

    # -- machines ------------------------------------------------------------------------------------------------------

    def new_pid(self) -> int:
        """A process id that was never used."""
        return next(self._pids)

    def new_machine(self, name: str) -> Machine:
        """Puts a machine into the network."""
        skew_s = self.scheduler.random.uniform(-1, 1) * self.parameters.clock_skew_s
        machine = Machine(self, name, next(self._numbers), skew_s)
        self.machines[name] = self._hosts[machine.host] = machine
        return machine

    def machine_at(self, host: str) -> Machine:
        """The machine with an address, also if it is gone."""
        return self._hosts[host]

    def start_agent(self, machine: Machine) -> Process:
        """Starts the agent of a machine."""
        incarnation = f"{machine.name}@{next(self._incarnations)}"
        process = machine.start(machine.name, self._run_agent, {"INCARNATION": incarnation}, None)
        self.checks.agents[incarnation] = process
        return process

    def agents(self) -> list[Process]:
        """The live agents."""
        return [process for process in self.checks.agents.values() if process.alive]

    def lose(self, machines: list[Machine], *, silent: bool) -> None:
        """Machines lose their power at one instant."""
        self.checks.before_loss()
        agents = {process.machine: incarnation for incarnation, process in self.checks.agents.items()}
        for machine in machines:
            machine.power_off(silent=silent)
        lost = {agents.get(machine) for machine in machines}
        self.checks.lost([slot for slot, incarnation in self.checks.members.items() if incarnation in lost])

    def _run_agent(self) -> int:
        process = this_process()
        settings = WorkerAgentSettings(
            job=JOB,
            name=process.machine.name,
            incarnation=process.environ["INCARNATION"],
            secret=b"known to agents alone",
            spec=self._spec,
            run_dir=self._spec.run_dir,
            host=process.machine.host,
        )
        store = SimulatedKeyValueStore(self.store)
        process.agent = agent = WorkerAgent(
            settings,
            store,
            _Log(),  # type: ignore[arg-type]
            make_pool=SimulatedWarmPool,
            make_port=PortReservation,  # type: ignore[arg-type]
            events=EventLog(None),
        )
        agent.run()
        return agent.exit_code

    # -- what the simulation hears of ----------------------------------------------------------------------------------

    def run_worker(self) -> None:
        """What a worker process runs."""
        Trainer(self.program, self.rendezvous, self.disk, self.checks).run()

    def worker_started(self, worker: Process) -> None:
        """A fork server has started a worker."""
        self.checks.worker_started(worker)
        worker.ended.append(lambda ended: self.note(f"{ended} ended with {ended.exit_code}"))

    def _observe(self, writer: Process | None, key: str, now: Any) -> None:
        kind, _, slot = key.removeprefix(self.keys.prefix).partition("/")
        self.checks.wrote(writer, kind, slot, now)
        if kind == "root":
            self.note(f"root: {now.value if now is not None else 'gone'}")

    def _thread_died(self, fiber: Fiber, error: BaseException) -> None:
        self.checks.violated(0, f"{fiber.name} died of {type(error).__name__}: {error}")
        import traceback

        for line in traceback.format_exception(error):
            self.note(line.rstrip())
