"""``lightning-gemini run``: starts a cluster, watches over it, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import queue
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog
from lightning_gemini.controlplane.job_spec import JobSpec, proof_of
from lightning_gemini.controlplane.job_view import JobView
from lightning_gemini.controlplane.kv.base import KeyChange, KeyValueStore, StoreUnavailableError
from lightning_gemini.controlplane.kv.cluster import EtcdCluster
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore
from lightning_gemini.controlplane.logs import setup_logging
from lightning_gemini.controlplane.membership import JobKeys
from lightning_gemini.controlplane.operators.base import JobAccess, Operator
from lightning_gemini.controlplane.operators.registry import make_operator
from lightning_gemini.controlplane.reconcile import JobEnd, Reconciler
from lightning_gemini.controlplane.run_directory import RunDirectory
from lightning_gemini.controlplane.run_settings import RunSettings
from lightning_gemini.controlplane.terminal import Terminal
from lightning_gemini.controlplane.warm_pool import modules_to_preload

__all__ = ["Companion", "Launcher", "RunSettings"]

_POLL_S = 0.1


class Companion(Protocol):
    """Something that runs beside a job."""

    def start(self) -> None:
        """The job has been announced."""

    def close(self) -> object:
        """The job has ended; returns what there is to say about it, for people."""


class Launcher:
    """Runs one job; `run` must be called on the main thread.

    Args:
        settings: See `RunSettings`.
        beside: Makes what runs beside the job, given its run directory.
    """

    def __init__(self, settings: RunSettings, beside: Callable[[Path], Companion] | None = None) -> None:
        self._settings, self._beside = settings, beside
        self._signal: int | None = None

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
        settings = self._settings
        log = setup_logging(directory.path / "logs" / "launcher.jsonl")
        etcd = EtcdCluster(directory.path / "etcd", settings.etcd_members, settings.host)
        try:
            if settings.etcd is None:
                etcd.start()
            job = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
            end = _Job(settings, directory, job, etcd).run(self._beside, lambda: self._signal)
        finally:
            etcd.close()
            logging.getLogger("lightning_gemini").removeHandler(log)
        return end.exit_code


class _Job:
    """One job, from its announcement to its end."""

    def __init__(self, settings: RunSettings, directory: RunDirectory, job: str, etcd: EtcdCluster) -> None:
        cluster = settings.cluster
        self._settings, self._directory, self._name, self._etcd = settings, directory, job, etcd
        self._endpoint = settings.etcd or etcd.endpoint
        self._secret_file = directory.write_secret()
        self._keys = JobKeys(job)
        self._view = JobView(self._keys)
        self._changes: queue.SimpleQueue[Sequence[KeyChange]] = queue.SimpleQueue()
        self._events = EventLog(directory.path / EVENTS_FILE)
        self._terminal = Terminal(directory.path, settings.nodes * settings.nproc_per_node)
        self._etcd_pids = etcd.pids
        shares_imports = settings.operator == "local" or settings.operator_settings.get("shared_imports", False)
        imports_once = shares_imports and settings.nodes + settings.standby > 1
        self._template = directory.template_socket(job) if imports_once else None
        self._access = JobAccess(
            job, self._endpoint, self._secret_file, directory.path, cluster.lease_ttl_s, cluster.stop_timeout_s
        )

    def run(self, beside: Callable[[Path], Companion] | None, interrupted: Callable[[], int | None]) -> JobEnd:
        """Runs the job to its end."""
        operator = self._make_operator()
        store = EtcdKeyValueStore(self._endpoint)
        companion = beside(self._directory.path) if beside is not None else None
        try:
            store.put(self._keys.spec, self._spec().to_json())
            self._announce()
            store.watch_prefix(self._keys.prefix, self._changes.put)
            if companion is not None:
                companion.start()
            end = self._watch_over(Reconciler(operator, self._view, self._settings.cluster.lease_ttl_s), interrupted)
            self._publish(end, store)
        finally:
            said = None if companion is None else companion.close()
            operator.close()
            self._forget(store)
        self._conclude(end, said)
        return end

    def _watch_over(self, reconciler: Reconciler, interrupted: Callable[[], int | None]) -> JobEnd:
        while True:
            self._look()
            if (number := interrupted()) is not None:
                return JobEnd(False, f"interrupted by {signal.Signals(number).name}", 128 + number)
            if self._view.result is not None:
                success = bool(self._view.result["success"])
                return JobEnd(success, self._view.result["reason"], 0 if success else 1)
            end = reconciler.step(self._wanted())
            if end is not None:
                return end
            self._keep_etcd()
            self._terminal.refresh()
            time.sleep(_POLL_S)

    def _look(self) -> None:
        while not self._changes.empty():
            for change in self._changes.get():
                self._view.take(change)

    def _wanted(self) -> int:
        """Standbys come once everybody has a slot, so that the first machines get the first slots."""
        return self._settings.nodes + (self._settings.standby if self._view.ordered else 0)

    def _make_operator(self) -> Operator:
        settings = self._settings
        return make_operator(
            settings.operator,
            settings.operator_settings,
            self._access,
            keep=lambda: self._etcd.pids,
            domains=settings.domains,
            template=self._template,
            modules=modules_to_preload(settings.preload),
        )

    def _spec(self) -> JobSpec:
        settings, cluster = self._settings, self._settings.cluster
        return JobSpec(
            nodes=settings.nodes,
            nproc_per_node=settings.nproc_per_node,
            script=settings.command,
            run_dir=self._directory.path,
            preload=settings.preload,
            template=self._template,
            lease_ttl_s=cluster.lease_ttl_s,
            max_failures=cluster.max_failures_without_progress,
            stop_timeout_s=cluster.stop_timeout_s,
            report_timeout_s=cluster.report_timeout_s,
            proof=proof_of(bytes.fromhex(self._secret_file.read_text()), self._name),
        )

    def _announce(self) -> None:
        settings = self._settings
        self._write_job()
        shape = {"nodes": settings.nodes, "nproc_per_node": settings.nproc_per_node, "standby": settings.standby}
        world_size = settings.nodes * settings.nproc_per_node
        self._events.append("job_started", **shape, world_size=world_size, script=list(settings.command))
        standby = f" and {settings.standby} standing by" if settings.standby else ""
        self._terminal.say(
            f"job {self._name}: {settings.nodes} nodes × {settings.nproc_per_node} ranks{standby}, "
            f"run directory {self._directory.path}"
        )

    def _write_job(self) -> None:
        settings = self._settings
        sockets = self._directory.sockets(self._name, settings.nodes)
        self._directory.write_job(
            {
                "job": self._name,
                "nodes": settings.nodes,
                "nproc_per_node": settings.nproc_per_node,
                "standby": settings.standby,
                "operator": settings.operator,
                "etcd": self._endpoint,
                "etcd_pids": self._etcd_pids,
                "secret_file": str(self._secret_file),
                "script": list(settings.command),
                "started": time.time(),
                "domains": settings.slot_domains(),
                "machines": [{"node": slot, "socket": str(path)} for slot, path in sockets.items()],
            }
        )

    def _keep_etcd(self) -> None:
        self._etcd.keep_alive()
        if self._etcd.pids != self._etcd_pids:
            self._etcd_pids = self._etcd.pids
            self._write_job()

    def _publish(self, end: JobEnd, store: KeyValueStore) -> None:
        """Tells the agents, so that none takes the end of the others for failures."""
        if self._view.result is None:
            with suppress(StoreUnavailableError):
                store.put(self._keys.result, json.dumps({"success": end.success, "reason": end.reason}))

    def _forget(self, store: KeyValueStore) -> None:
        """Leaves no key of the job in an etcd that is not ours."""
        with suppress(StoreUnavailableError):
            for found in store.get_prefix(self._keys.prefix) if self._settings.etcd is not None else ():
                store.delete(found.key)
        store.close()

    def _conclude(self, end: JobEnd, said: Any) -> None:
        self._events.append("job_finished", success=end.success, reason=end.reason)
        self._terminal.refresh()
        if end.exit_code == 1:
            self._terminal.show_failure()
        if said is not None:
            self._terminal.say(str(said))
        self._terminal.say(f"job {'finished' if end.success else 'failed'}: {end.reason}")
