"""Jobs of `lightning-gemini run` that train for real, and what is left of them."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_gemini.cli.inject import inject_nodes
from lightning_gemini.controlplane.faults.observer import Observer
from lightning_gemini.controlplane.processes import start_time, wait_gone
from lightning_gemini.controlplane.run_directory import find_job
from tests.cli.conftest import Run

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))  # recipes import each other as neighbours

SCRIPT = Path(__file__).with_name("plain_script.py").read_text()
NODES = 4
EPOCHS = 6  # of 10 batches a rank, two a step


class Training(Run):
    """One run of the plain script; ``seconds``: how long a step sleeps."""

    def __init__(
        self,
        directory: Path,
        strategy: str,
        *,
        nodes: int = NODES,
        epochs: int = EPOCHS,
        seconds: float = 0.1,
        **options: str,
    ) -> None:
        arguments = (strategy, str(directory), str(epochs), str(seconds))
        preload = "deepspeed.runtime.zero.muon.muon_optimizer"
        super().__init__(directory, directory, SCRIPT, *arguments, nodes=nodes, preload=preload, **options)
        self.nodes = nodes
        self.directory = directory
        self.ports: set[tuple[int, int]] = set()

    def step(self) -> int:
        """Optimizer steps that every rank has completed."""
        self.until((self.path / "job.json").exists)
        with Observer(find_job(self.path)) as observer:
            return observer.look().step

    def until_step(self, step: int, timeout_s: float = 240) -> int:
        return int(self.until(lambda: (now := self.step()) >= step and now, timeout_s))

    def kill(self, kind: str, *nodes: int) -> dict[str, Any]:
        """SIGKILLs a worker of a node, or nodes with all that is on them, and sees them dead."""
        self.ports |= self.listening()
        fault = inject_nodes(self.path, kind, list(nodes), timeout_s=60)
        assert fault["pids"]
        assert not wait_gone(fault["pids"], 10)
        return fault

    def listening(self) -> set[tuple[int, int]]:
        """TCP ports at which the run's processes listen, with the process: the port alone may be another's later."""
        found = set()
        for pid in [*self.pids(), self.process.pid]:
            try:
                connections = psutil.Process(pid).net_connections("tcp")
            except psutil.Error:
                continue
            found |= {(pid, entry.laddr.port) for entry in connections if entry.status == psutil.CONN_LISTEN}
        return found

    def view(self) -> dict[str, Any]:
        """What an agent sees of the job: ``root``, ``root_name``, ``standbys``."""
        with Observer(find_job(self.path)) as observer:
            return next((status for status in observer.look().statuses if status), {})

    def committed(self) -> int:
        """Newest version that every owner has complete on another machine too."""
        with Observer(find_job(self.path)) as observer:
            statuses = [status for status in observer.look().statuses if status]
        newest = dict.fromkeys(range(self.nodes), 0)
        for holding in (holding for status in statuses for holding in status["holdings"]):
            if holding["role"] == "replica" and holding["complete"]:
                newest[holding["owner"]] = max(newest[holding["owner"]], holding["version"])
        return min(newest.values())

    def times(self, rank: int = 0) -> list[tuple[int, float]]:
        """When a rank completed its batches, and which (from 1); again after each recovery."""
        lines = (self.directory / f"times{rank}.txt").read_text().split("\n")[:-1]
        return [(int(number), float(when)) for number, when in (line.split() for line in lines)]

    def hurry(self) -> None:
        """No more sleeping in the steps."""
        (self.directory / "hurry").touch()

    def end(self) -> None:
        """Ends it, if need be, and removes what it wrote."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        shutil.rmtree(self.directory, ignore_errors=True)

    def results(self) -> list[dict[str, Any]]:
        return [json.loads((self.directory / f"result{rank}.json").read_text()) for rank in range(self.nodes)]

    def assert_clean(self) -> None:
        """No process, no socket, no port, no shared memory is left of the run."""
        self.assert_nothing_left()
        assert not [pid for pid in self.pids() if start_time(pid) is not None]
        assert not list(self.directory.rglob("*.sock"))
        assert self.ports
        assert not self.ports & {(entry.pid, entry.laddr.port) for entry in psutil.net_connections("tcp")}


@pytest.fixture
def train() -> Iterator[Callable[..., Training]]:
    runs: list[Training] = []

    def begin(strategy: str, **options: Any) -> Training:
        # A short path: agents' sockets must fit in 100 bytes.
        directory = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
        runs.append(Training(directory, strategy, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture(scope="session")
def undisturbed() -> Callable[..., list[dict[str, Any]]]:
    """What every rank has at the end of a run that nobody disturbs, without checkpoints."""
    known: dict[tuple[str, int, int], list[dict[str, Any]]] = {}

    def results(stage: str, epochs: int = EPOCHS, nodes: int = NODES) -> list[dict[str, Any]]:
        if (stage, epochs, nodes) not in known:
            directory = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
            strategy = json.dumps({"stage": int(stage), "checkpoint_every": 0})
            run = Training(directory, strategy, epochs=epochs, nodes=nodes)
            try:
                run.hurry()
                assert run.wait(180) == 0, run.output.read_text()
                known[stage, epochs, nodes] = run.results()
            finally:
                run.end()
        return known[stage, epochs, nodes]

    return results
