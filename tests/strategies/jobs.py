"""Jobs that a test starts, kills and starts again; their processes are forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.controlplane.processes import wait_gone
from lightning_gemini.controlplane.warm_pool import WarmPool, WorkerCommand, WorkerExit

SCRIPT = Path(__file__).with_name("training.py")
TIMEOUT_S = 90.0
_FIRST_PORT, _PORTS = 20_000, 12_000
_drawn = itertools.count(997 * os.getpid())  # tests in other processes begin elsewhere


class Forks:
    """Starts scripts in forked processes, and tells how they ended."""

    def __init__(self, log_path: Path) -> None:
        self._exits: dict[str, WorkerExit] = {}
        self._pids: dict[str, int] = {}
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        preload = ("torchdata.stateful_dataloader", "deepspeed.runtime.zero.muon.muon_optimizer")
        self._pool = WarmPool(self._news.put, preload=preload, log_path=log_path)

    def __enter__(self) -> Forks:
        self._pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def launch(self, commands: Sequence[WorkerCommand]) -> list[int]:
        self._pool.launch(commands)
        self._until(lambda: all(command.token in self._pids for command in commands))
        return [self._pids[command.token] for command in commands]

    def exit_of(self, token: str) -> WorkerExit | None:
        self._read(0.0)
        return self._exits.get(token)

    def wait(self, tokens: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[WorkerExit]:
        self._until(lambda: all(token in self._exits for token in tokens), timeout_s)
        return [self._exits[token] for token in tokens]

    def _until(self, condition: Any, timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError
            self._read(0.2)

    def _read(self, timeout_s: float) -> None:
        try:
            while True:
                news = self._news.get(timeout=timeout_s) if timeout_s else self._news.get_nowait()
                timeout_s = 0.0
                if isinstance(news, WorkerExit):
                    self._exits[news.token] = news
                elif isinstance(news, dict) and news["event"] == "started":
                    self._pids[news["token"]] = news["pid"]
        except queue.Empty:
            return


@dataclass(frozen=True, repr=False)
class Outcome:
    """What one attempt left: records by rank, exit by rank, and everything that it printed."""

    records: list[list[dict[str, Any]]]
    exits: list[WorkerExit]
    output: str

    @property
    def start(self) -> dict[str, Any]:
        """Rank 0's start of training; all ranks went on from the same place."""
        starts = [[record for record in records if record["kind"] == "start"] for records in self.records]
        assert all(found and found[0]["step"] == starts[0][0]["step"] for found in starts), self.output
        return starts[0][0]

    @property
    def ended(self) -> bool:
        return all(end.code == 0 for end in self.exits)

    def of(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        return [record for record in self.records[rank] if record["kind"] == kind]


class Job:
    """One job: the same command, typed as often as it takes.

    Args:
        forks: Starts its processes.
        directory: Its files.
        runtime: A short directory for its agents' sockets.
        machines: Machines that it believes to run on, each with an agent of its own.
        nproc: Ranks on each machine.
        options: Fields of ``training.Options``.
    """

    def __init__(
        self, forks: Forks, directory: Path, runtime: Path, machines: int = 1, nproc: int = 2, **options: Any
    ) -> None:
        self.forks, self.directory, self.runtime = forks, directory, runtime
        self.machines, self.nproc, self.options = machines, nproc, options
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.env: dict[str, str] = {}
        self.machine_env: dict[int, dict[str, str]] = {}
        self.attempts: list[Outcome] = []
        self._tokens: list[str] = []

    @property
    def world_size(self) -> int:
        return self.machines * self.nproc

    def run_script(self, script: Path) -> Outcome:
        """Runs another script with the same options and processes."""
        return self.run(script=script)

    def run(self, stop: Mapping[str, Any] | None = None, script: Path = SCRIPT, **changes: Any) -> Outcome:
        """Types the command once. With ``stop``, every process is killed with SIGKILL at that place."""
        out = self.directory / "out"
        out.mkdir(parents=True, exist_ok=True)
        for path in (*out.glob("rank*.jsonl"), *out.glob("stopped*")):
            path.unlink()
        number = len(self.attempts)
        options = self.directory / f"options{number}.json"
        options.write_text(json.dumps({"out": str(out), **self.options, **changes, "stop": stop}))
        log = self.directory / f"attempt{number}.log"
        tokens = [f"{self.name}/{number}/{rank}" for rank in range(self.world_size)]
        commands = [
            WorkerCommand(token, (str(script), str(options)), env, log)
            for token, env in zip(tokens, self._environments(), strict=True)
        ]
        pids = self.forks.launch(commands)
        try:
            if stop is not None:
                self._wait_for_stop(out, tokens, log)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            exits = self._wait(tokens, log)
        except BaseException:
            for pid in pids:
                if self.forks.exit_of(tokens[pids.index(pid)]) is None:
                    os.kill(pid, signal.SIGKILL)
            raise
        if stop is not None:
            assert [end.signal for end in exits] == ["SIGKILL"] * len(exits), tail(log)
        outcome = Outcome(self._records(out), exits, log.read_text())
        self.attempts.append(outcome)
        return outcome

    def _wait(self, tokens: list[str], log: Path) -> list[WorkerExit]:
        try:
            return self.forks.wait(tokens)
        except TimeoutError:
            raise AssertionError(f"still running: {tail(log)}") from None

    def _wait_for_stop(self, out: Path, tokens: list[str], log: Path) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not all((out / f"stopped{rank}").exists() for rank in range(self.world_size)):
            ended = [self.forks.exit_of(token) for token in tokens]
            assert not any(ended), f"ended before the place of the kill: {ended} {tail(log)}"
            assert time.monotonic() < deadline, tail(log)
            time.sleep(0.02)

    def _environments(self) -> Iterator[dict[str, str]]:
        port = free_port()
        for rank in range(self.world_size):
            machine, local = divmod(rank, self.nproc)
            yield {
                "RANK": str(rank),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.nproc),
                "GROUP_RANK": str(machine),
                "GROUP_WORLD_SIZE": str(self.machines),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": self.name,
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_USE_AGENT_STORE": "False",
                "LIGHTNING_GEMINI_JOB": self.name,
                "TMPDIR": str(self.runtime),
                # On GPUs: NCCL takes machines that share one for machines, and reaches them over the network.
                "NCCL_HOSTID": f"{self.name}-{machine}",
                "NCCL_SOCKET_IFNAME": "lo",
                "NCCL_IB_DISABLE": "1",
                "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # so that training's communicator does not wait for another one
                **self.env,
                **self.machine_env.get(machine, {}),
            }

    def _records(self, out: Path) -> list[list[dict[str, Any]]]:
        paths = [out / f"rank{rank}.jsonl" for rank in range(self.world_size)]
        return [[json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [] for path in paths]

    # -- the agents that it leaves behind ----------------------------------------------------------------------------

    def socket_of(self, machine: int) -> Path:
        return self.runtime / f"lightning-gemini-{os.getuid()}" / self.name / f"agent-{machine}.sock"

    @contextmanager
    def agent(self, machine: int = 0) -> Iterator[AgentClient]:
        with AgentClient(self.socket_of(machine), self.name) as client:
            yield client

    def agents(self) -> list[int]:
        """Machines whose agent lives."""
        return [machine for machine in range(self.machines) if self.socket_of(machine).exists()]

    def holdings(self, machine: int = 0) -> list[tuple[int, int]]:
        """(owner, version) of all complete versions of a machine."""
        with self.agent(machine) as client:
            found = client.status()["holdings"]
        return sorted((entry["owner"], entry["version"]) for entry in found if entry["complete"])

    def kill_agent(self, machine: int = 0) -> None:
        """The machine's memory is lost."""
        with self.agent(machine) as client:
            pid = int(client.identity["pid"])
        os.kill(pid, signal.SIGKILL)
        assert not wait_gone([pid], 5)

    def wait_without_agents(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.agents():
            assert time.monotonic() < deadline, "an agent is still there"
            time.sleep(0.05)

    def forget(self) -> None:
        """Ends the agents."""
        for machine in self.agents():
            try:
                with self.agent(machine) as client:
                    pid = int(client.identity["pid"])
                    client.stop()
                assert not wait_gone([pid], 5)
            except ConnectionError:
                pass  # it was killed


def tail(log: Path) -> str:
    return log.read_text()[-3000:]


def free_port() -> int:
    """None of those that the kernel gives out by itself: a test beside this one could get it before the job does."""
    while True:
        port = _FIRST_PORT + next(_drawn) % _PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def assert_same_training(reference: Outcome, attempts: Sequence[Outcome]) -> None:
    """All attempts together saw exactly what the reference saw, and ended with its very bits."""
    assert attempts[-1].ended, attempts[-1].output
    for rank, expected in enumerate(reference.records):
        seen: dict[tuple[Any, ...], dict[str, Any]] = {}
        for attempt in attempts:
            for record in attempt.of("train", rank) + attempt.of("val", rank):
                key = (record["kind"], record["epoch"], record["batch"], record["step"])
                first = seen.setdefault(key, record)
                assert first == record, f"rank {rank}: first {first}, when repeated {record}"
        wanted = {
            (record["kind"], record["epoch"], record["batch"], record["step"]): record
            for record in expected
            if record["kind"] in ("train", "val")
        }
        assert seen == wanted, f"rank {rank}: {describe_difference(wanted, seen)}"
        (end,), (ended,) = reference.of("end", rank), attempts[-1].of("end", rank)
        different = {
            name: (end["state"].get(name), ended["state"].get(name))
            for name in {**end["state"], **ended["state"]}
            if end["state"].get(name) != ended["state"].get(name)
        }
        assert not different, f"rank {rank}: (undisturbed, interrupted) {different}"


def describe_difference(wanted: dict[Any, Any], seen: dict[Any, Any]) -> str:
    missing, extra = [key for key in wanted if key not in seen], [key for key in seen if key not in wanted]
    changed = [(wanted[key], seen[key]) for key in wanted if key in seen and wanted[key] != seen[key]]
    return f"missing {missing[:4]}, more {extra[:4]}, (undisturbed, interrupted) {changed[:2]}"
