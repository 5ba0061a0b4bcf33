"""``lightning-gemini run``: starts a local cluster, watches over it, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lightning_gemini.config import ClusterConfig
from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog
from lightning_gemini.controlplane.kv.base import KeyChange
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore, reachable
from lightning_gemini.controlplane.kv.server import EtcdServer
from lightning_gemini.controlplane.logs import setup_logging
from lightning_gemini.controlplane.membership import JobKeys
from lightning_gemini.controlplane.operators.base import Machine
from lightning_gemini.controlplane.operators.local import LocalOperator
from lightning_gemini.controlplane.run_directory import RunDirectory
from lightning_gemini.controlplane.terminal import Terminal
from lightning_gemini.controlplane.warm_pool import modules_to_preload
from lightning_gemini.errors import ConfigurationError

_log = logging.getLogger(__name__)
_POLL_S = 0.1
_MAX_STILLBORN = 3


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What the user asked for; ``etcd`` is ``HOST:PORT``, or None to start one."""

    script: Path
    arguments: tuple[str, ...] = ()
    nodes: int = 1
    nproc_per_node: int = 1
    run_dir: Path | None = None
    etcd: str | None = None
    preload: tuple[str, ...] = ()
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            ConfigurationError: With what to do about it.
        """
        for name, value in (("--local-nodes", self.nodes), ("--nproc-per-node", self.nproc_per_node)):
            if value < 1:
                raise ConfigurationError(f"{name} must be 1 or more, got {value}")
        if self.cluster.max_failures_without_progress < 0:
            raise ConfigurationError("--max-failures must be 0 or more")
        if not self.script.is_file():
            raise ConfigurationError(f"there is no script {self.script}: give the path of a Python file")
        if self.etcd is not None and (trouble := reachable(self.etcd)) is not None:
            raise ConfigurationError(f"no etcd answers at {self.etcd} ({trouble}): start it, or leave --etcd out")


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended."""

    success: bool
    reason: str
    exit_code: int


class Launcher:
    """Runs one job; `run` must be called on the main thread.

    Args:
        settings: See `RunSettings`.
    """

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._signal: int | None = None
        self._stored: dict[str, str] = {}  # the job's keys, kept current by the watch
        self._joined: set[str] = set()  # incarnations that were members once
        self._missed: dict[str, float] = {}  # live incarnations that the root has given up, since when
        self._stillborn = 0

    def run(self) -> int:
        """Runs the job to its end; returns the exit code of the command.

        Raises:
            ConfigurationError: If it cannot start.
        """
        self._settings.check()
        directory = RunDirectory.claim(self._settings.run_dir)
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._run_in(directory)
        finally:
            directory.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number

    def _run_in(self, directory: RunDirectory) -> int:
        job = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        log = setup_logging(directory.path / "logs" / "launcher.jsonl")
        terminal = Terminal(directory.path, self._settings.nodes * self._settings.nproc_per_node)
        server = EtcdServer(directory.path / "etcd")
        try:
            if self._settings.etcd is None:
                server.start()
            return self._run_job(directory, job, server, terminal)
        finally:
            server.close()
            logging.getLogger("lightning_gemini").removeHandler(log)

    def _run_job(self, directory: RunDirectory, job: str, server: EtcdServer, terminal: Terminal) -> int:
        endpoint = self._settings.etcd or server.endpoint
        events = EventLog(directory.path / EVENTS_FILE)
        operator = self._operator(directory, job, endpoint)
        if server.pid is not None:
            operator.keep.add(server.pid)
        store = EtcdKeyValueStore(endpoint)
        try:
            self._announce(directory, job, endpoint, events, terminal)
            store.watch_prefix(JobKeys(job).prefix, self._remember)
            if self._settings.nodes > 1:
                operator.start_template(directory.template_socket(job), modules_to_preload(self._settings.preload))
            for slot in range(self._settings.nodes):
                operator.start_machine(slot)
            while (end := self._supervise(operator, job)) is None:
                self._keep_etcd(server, operator)
                terminal.refresh()
                time.sleep(_POLL_S)
        finally:
            operator.close()
            directory.template_socket(job).unlink(missing_ok=True)
            store.close()
        self._conclude(end, events, terminal)
        return end.exit_code

    def _operator(self, directory: RunDirectory, job: str, endpoint: str) -> LocalOperator:
        settings, cluster = self._settings, self._settings.cluster
        shared = {
            "job": job,
            "nodes": settings.nodes,
            "nproc_per_node": settings.nproc_per_node,
            "script": [str(settings.script), *settings.arguments],
            "run_dir": str(directory.path),
            "secret_file": str(directory.write_secret()),
            "etcd": endpoint,
            "preload": list(settings.preload),
            "template": str(directory.template_socket(job)) if settings.nodes > 1 else None,
            "lease_ttl_s": cluster.lease_ttl_s,
            "max_failures": cluster.max_failures_without_progress,
            "stop_timeout_s": cluster.stop_timeout_s,
        }
        sockets = directory.sockets(job, settings.nodes)
        return LocalOperator(directory.path, shared, sockets, cluster.stop_timeout_s + 3.0)

    def _announce(self, directory: RunDirectory, job: str, endpoint: str, events: EventLog, terminal: Terminal) -> None:
        settings = self._settings
        sockets = directory.sockets(job, settings.nodes)
        shape = {"nodes": settings.nodes, "nproc_per_node": settings.nproc_per_node}
        script = [str(settings.script), *settings.arguments]
        where = {"etcd": endpoint, "secret_file": str(directory.path / "secret")}
        machines = [{"node": slot, "socket": str(path)} for slot, path in sockets.items()]
        directory.write_job(
            {"job": job, **shape, **where, "script": script, "started": time.time(), "machines": machines}
        )
        world_size = settings.nodes * settings.nproc_per_node
        events.append("job_started", **shape, world_size=world_size, script=script)
        terminal.say(
            f"job {job}: {settings.nodes} nodes × {settings.nproc_per_node} ranks, run directory {directory.path}"
        )

    def _remember(self, changes: Sequence[KeyChange]) -> None:
        for change in changes:
            if change.now is None:
                self._stored.pop(change.key, None)
            else:
                self._stored[change.key] = change.now.value
                if "/members/" in change.key:
                    self._joined.add(json.loads(change.now.value)["incarnation"])

    def _supervise(self, operator: LocalOperator, job: str) -> JobEnd | None:
        """Looks after the cluster once; returns how the job ended when it did."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            return JobEnd(False, f"interrupted by {name}", 128 + self._signal)
        keys = JobKeys(job)
        if keys.result in self._stored:
            result = json.loads(self._stored[keys.result])
            return JobEnd(result["success"], result["reason"], 0 if result["success"] else 1)
        for machine in operator.machines():
            if machine.returncode is not None and machine.returncode >= 0:
                why = f"see logs/node{machine.slot}-agent.out" if machine.returncode else "somebody stopped it"
                return JobEnd(False, f"the agent of node {machine.slot} ended ({why})", 1)
            if self._to_be_replaced(machine, keys):
                self._stillborn = 0 if machine.incarnation in self._joined else self._stillborn + 1
                if self._stillborn > _MAX_STILLBORN:
                    return JobEnd(
                        False, f"the agent of node {machine.slot} was killed at its start, again and again", 1
                    )
                self._replace(operator, machine.slot)
        return None

    def _replace(self, operator: LocalOperator, slot: int) -> None:
        operator.destroy_machine(slot)
        machine = operator.start_machine(slot)
        _log.warning("node %d: replacement agent started (pid %s)", slot, machine.pid)

    def _to_be_replaced(self, machine: Machine, keys: JobKeys) -> bool:
        """A dead agent at once, a live one when the root has given it up and it does not come back.

        The successor boots while the dead one's lease runs out: until then nobody can tell that the machine is gone.
        """
        if machine.returncode is not None:
            return True
        absent = keys.member(machine.slot) not in self._stored
        wish = self._stored.get(keys.replace(machine.slot))
        if not absent or wish is None or json.loads(wish)["incarnation"] != machine.incarnation:
            self._missed.pop(machine.incarnation, None)
            return False
        since = self._missed.setdefault(machine.incarnation, time.monotonic())
        return time.monotonic() - since > 2 * self._settings.cluster.lease_ttl_s

    def _keep_etcd(self, server: EtcdServer, operator: LocalOperator) -> None:
        if server.pid is not None and not server.alive():
            _log.warning("etcd ended; training goes on without it while it starts again")
            server.restart()
            operator.keep.add(server.pid)

    def _conclude(self, end: JobEnd, events: EventLog, terminal: Terminal) -> None:
        events.append("job_finished", success=end.success, reason=end.reason)
        terminal.refresh()
        if end.exit_code == 1:
            terminal.show_failure()
        terminal.say(f"job {'finished' if end.success else 'failed'}: {end.reason}")
