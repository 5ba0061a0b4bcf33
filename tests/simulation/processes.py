"""Simulated machines and the processes on them: agents, fork servers and workers, and how they die."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from typing import Any

from lightning_gemini.controlplane.warm_pool import WarmPool
from tests.simulation import sockets
from tests.simulation.scheduler import Active, Process, this_process
from tests.simulation.sockets import Socket
from tests.simulation.threads import Event, SimpleQueue, Thread


class Machine:
    """A machine of the simulated cluster.

    Attributes:
        name: Unique in the simulation.
        host: Its address.
        silent: Whether it lost its power: not even its kernel answers any more.
        skew_s: How far its wall clock is off.
    """

    def __init__(self, cluster: Any, name: str, number: int, skew_s: float) -> None:
        self.cluster, self.name, self.skew_s = cluster, name, skew_s
        self.network = cluster.network
        self.host = f"10.{number // 65536}.{number // 256 % 256}.{number % 256}"
        self.silent = False
        self.listeners: dict[Any, Any] = {}
        self.links: dict[str, str] = {}
        self.processes: list[Process] = []
        self._ports = itertools.count(20_000)

    def __repr__(self) -> str:
        return self.name

    def free_port(self) -> int:
        """A port that nobody uses here."""
        return next(self._ports)

    def start(
        self, name: str, program: Callable[[], int | None], environ: dict[str, str], parent: Process | None
    ) -> Process:
        """Starts a process; it dies with its parent."""
        process = Process(name, self, self.cluster.new_pid(), environ)
        self.processes.append(process)
        self.cluster.processes[process.pid] = process
        if parent is not None:
            parent.ended.append(lambda _: kill(process))
        Active.scheduler.spawn(process, lambda: _run(process, program), f"{name}/main")
        return process

    def power_off(self, *, silent: bool) -> None:
        """Everything on it dies at once; if ``silent`` its peers do not even hear that connections are gone."""
        self.silent = silent
        for process in self.processes:
            kill(process)
        self.silent = True


def _run(process: Process, program: Callable[[], int | None]) -> None:
    try:
        code = program() or 0
    except Exception as error:
        code = 1
        process.machine.cluster.note(f"{process} ends: {type(error).__name__}: {error}")
        process.failure = error
    finish(process, code << 8, code)


def kill(process: Process) -> None:
    """SIGKILL."""
    if process.alive:
        finish(process, signal.SIGKILL, -signal.SIGKILL)


def finish(process: Process, status: int, code: int) -> None:
    """The end of a process, as its kernel sees it: no code of it runs any more."""
    if not process.alive or Active.scheduler.closing:
        return
    process.status, process.exit_code = status, code
    Active.scheduler.end(process)
    sockets.close_all(process)
    for tell in process.ended:
        tell(process)
    if process in process.machine.processes:
        process.machine.processes.remove(process)


class ForkServer:
    """What `lightning_gemini.controlplane.fork_server` does, on simulated processes.

    Args:
        channel: Its end of the pool's socket pair.
        boot_s: How long it imports.
        run_worker: What a worker does.
    """

    def __init__(self, channel: Socket, boot_s: float, run_worker: Callable[[], None]) -> None:
        self._channel, self._boot_s, self._run_worker = channel, boot_s, run_worker
        self._news: SimpleQueue = SimpleQueue()
        self._workers: dict[int, Process] = {}

    def run(self) -> None:
        """The fork server's main thread."""
        scheduler = Active.scheduler
        scheduler.sleep(self._boot_s)
        self._say(event="ready", pid=this_process().pid, seconds=self._boot_s, warnings=[])
        Thread(target=self._read, name="requests").start()
        while (item := self._news.get()) is not None:
            if isinstance(item, Process):
                del self._workers[item.pid]
                self._say(event="exited", pid=item.pid, status=int(item.status))
            elif item["op"] == "fork":
                self._fork(item)
            else:
                for worker in list(self._workers.values()):
                    kill(worker)

    def _read(self) -> None:
        buffer = b""
        while received := self._channel.recv(1 << 16):
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                self._news.put(json.loads(line))
        self._news.put(None)

    def _fork(self, request: dict[str, Any]) -> None:
        scheduler, process = Active.scheduler, this_process()
        scheduler.sleep(0.002 + 0.03 * scheduler.random.random())
        environ = {**process.environ, **request["env"]}
        name = f"rank{environ['RANK']}g{environ['LIGHTNING_GEMINI_GENERATION']}"
        worker = process.machine.start(name, self._run_worker, environ, process)
        self._workers[worker.pid] = worker
        worker.ended.append(self._news.put)
        process.machine.cluster.worker_started(worker)
        self._say(event="started", token=request["token"], pid=worker.pid)

    def _say(self, **message: Any) -> None:
        self._channel.sendall(json.dumps(message).encode() + b"\n")


class _Child:
    """What `subprocess.Popen` hands out."""

    def __init__(self, process: Process) -> None:
        self.process, self.pid = process, process.pid
        self._gone = Event()
        process.ended.append(lambda _: self._gone.set())

    def kill(self) -> None:
        kill(self.process)

    def wait(self, timeout: float | None = None) -> int:
        self._gone.wait(timeout)
        return self.process.exit_code or 0


class SimulatedWarmPool(WarmPool):
    """The real pool; only the program that it starts is simulated."""

    def _start_process(self, theirs: Any) -> None:
        process = this_process()
        cluster = process.machine.cluster
        boot_s = cluster.pool_boot_s * (0.7 + 0.6 * Active.scheduler.random.random())
        started = Event()

        def serve() -> None:
            started.wait()
            ForkServer(inherited, boot_s, cluster.run_worker).run()

        child = process.machine.start(f"{process}/pool", serve, dict(process.environ), process)
        inherited = sockets.inherit(theirs, child)
        started.set()
        self._process = _Child(child)  # type: ignore[assignment]
        self._pid = child.pid


class PortReservation:
    """`worker_env.PortReservation` on a simulated machine."""

    def renew(self) -> int:
        return int(this_process().machine.free_port())

    def close(self) -> None:
        """Nothing is held."""


def kill_group(pid: int) -> None:
    """`processes.kill_group`."""
    process = this_process().machine.cluster.processes.get(pid)
    if process is not None:
        kill(process)


def wait_gone(pids: Any, timeout_s: float) -> list[int]:
    """`processes.wait_gone`."""
    scheduler, processes = Active.scheduler, this_process().machine.cluster.processes
    deadline = scheduler.now + timeout_s
    while (left := [pid for pid in pids if pid in processes and processes[pid].alive]) and scheduler.now < deadline:
        scheduler.sleep(0.01)
    return left
