"""Jobs of `lightning-gemini run` that train for real, and what is left of them."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_gemini.cli.inject import Observer, inject_nodes
from lightning_gemini.controlplane.processes import start_time, wait_gone
from lightning_gemini.controlplane.run_directory import find_job
from tests.cli.conftest import Run

SCRIPT = Path(__file__).with_name("plain_script.py").read_text()
NODES = 4
EPOCHS = 6  # of 10 batches a rank, two a step


class Training(Run):
    """One run of the plain script on four nodes."""

    def __init__(self, directory: Path, strategy: str, **options: str) -> None:
        super().__init__(
            directory,
            SCRIPT,
            strategy,
            str(directory),
            str(options.pop("epochs", EPOCHS)),
            nodes=NODES,
            preload="deepspeed.runtime.zero.muon.muon_optimizer",
            **options,
        )
        self.directory = directory
        self.ports: set[tuple[int, int]] = set()

    def step(self) -> int:
        """Optimizer steps that every rank has completed."""
        self.until((self.path / "job.json").exists)
        with Observer(find_job(self.path)) as observer:
            return observer.look().step

    def until_step(self, step: int, timeout_s: float = 120) -> int:
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

    def hurry(self) -> None:
        """No more sleeping in the steps."""
        (self.directory / "hurry").touch()

    def results(self) -> list[dict[str, Any]]:
        return [json.loads((self.directory / f"result{rank}.json").read_text()) for rank in range(NODES)]

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

    def begin(strategy: str, **options: str) -> Training:
        # A short path: agents' sockets must fit in 100 bytes.
        directory = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
        runs.append(Training(directory, strategy, **options))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(30)
        shutil.rmtree(run.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed() -> Callable[[str, int], list[dict[str, Any]]]:
    """What every rank has at the end of a run that nobody disturbs, without checkpoints."""
    known: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def results(stage: str, epochs: int = EPOCHS) -> list[dict[str, Any]]:
        if (stage, epochs) not in known:
            directory = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
            strategy = json.dumps({"stage": int(stage), "checkpoint_every": 0})
            run = Training(directory, strategy, epochs=str(epochs))
            run.hurry()
            assert run.wait(180) == 0, run.output.read_text()
            known[stage, epochs] = run.results()
            shutil.rmtree(directory)
        return known[stage, epochs]

    return results
