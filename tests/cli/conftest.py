"""Runs the command line as a user does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.controlplane.events import read_events
from lightning_gemini.controlplane.processes import wait_gone

COMMAND = [sys.executable, "-m", "lightning_gemini.cli"]


class Run:
    """A ``lightning-gemini run`` in the background."""

    def __init__(
        self,
        directory: Path,
        runtime: Path,
        source: str,
        *arguments: str,
        nodes: int = 2,
        nproc: int = 1,
        **options: str,
    ) -> None:
        self.path = directory / "run"
        script = directory / "script.py"
        script.write_text(source)
        shape = ["--local-nodes", str(nodes), "--nproc-per-node", str(nproc), "--preload", "none"]
        more = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        command = [*COMMAND, "run", *shape, "--run-dir", str(self.path), *more, str(script), *arguments]
        self.output = directory / "terminal.txt"
        # The link to the newest run must not be that of the person who runs the tests.
        self.env = {**os.environ, "TMPDIR": str(runtime)}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=self.env, cwd=os.getcwd())

    def call(self, *words: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *words], env=self.env, capture_output=True, text=True, timeout=timeout_s)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [event for event in read_events(self.path / "events.jsonl") if name in (None, event["event"])]

    def until(self, condition: Callable[[], Any], timeout_s: float = 30) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < deadline, self.output.read_text()
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)
        return found

    def until_running(self, generation: int = 1, workers: int = 2) -> None:
        def started() -> bool:
            events = [event for event in self.events("workers_started") if event["generation"] == generation]
            return sum(len(event["pids"]) for event in events) == workers

        self.until(started)

    def wait(self, timeout_s: float = 40) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running: {self.output.read_text()}")

    def job(self) -> dict[str, Any]:
        job: dict[str, Any] = json.loads((self.path / "job.json").read_text())
        return job

    def pids(self) -> list[int]:
        """Every process that belongs to the run, by the run directory on its command line or in its environment."""
        mine = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in (os.getpid(), self.process.pid):
                try:
                    words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                except OSError:
                    continue
                if str(self.path.parent).encode() in words:
                    mine.append(int(entry.name))
        return mine

    def assert_nothing_left(self) -> None:
        left = wait_gone(self.pids(), 5)
        assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        assert not [machine for machine in self.job()["machines"] if Path(machine["socket"]).exists()]
        assert not (self.path / "secret").exists()
        assert not (self.path / "etcd" / "data").exists()


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For unix sockets, whose paths must be short."""
    path = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def start(tmp_path: Path, short_directory: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(source: str, *arguments: str, **options: Any) -> Run:
        runs.append(Run(tmp_path, short_directory, source, *arguments, **options))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(20)


@pytest.fixture
def watch() -> Iterator[Callable[[Run], Any]]:
    """Opens the store of a run; see `tests.cli.watched.Watched`."""
    from tests.cli.watched import Watched

    opened: list[Watched] = []

    def begin(run: Run) -> Watched:
        opened.append(Watched(run))
        return opened[-1]

    yield begin
    for each in opened:
        each.close()
