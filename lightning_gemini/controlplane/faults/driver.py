"""Drives a failure model against a running job, on a thread of its own or on the caller's."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.events import EVENTS_FILE, EventLog, append_line
from lightning_gemini.controlplane.faults.injector import FaultInjector, NoVictimError
from lightning_gemini.controlplane.faults.observer import Observer, Sighting
from lightning_gemini.controlplane.faults.recovery_watch import RecoveryWatch
from lightning_gemini.controlplane.faults.targets import find_targets
from lightning_gemini.controlplane.processes import start_time
from lightning_gemini.controlplane.run_directory import JOB_FILE, find_job
from lightning_gemini.core.failure_model import FailureModel
from lightning_gemini.core.fault import PlannedFault
from lightning_gemini.core.fault_trace import format_trace
from lightning_gemini.errors import GeminiError

_log = logging.getLogger(__name__)
_POLL_S = 0.02
TRACE_FILE = "faults.trace"
"""In the run directory: what was planned, for doing it again (``--failure trace,file=…``)."""


@dataclass(slots=True)
class FaultCounts:
    """What a driver did.

    Attributes:
        injected: Kind → faults done.
        missed: Kind → planned faults for which there was no victim.
        waiting: Planned faults whose moment had not come when the job ended; endless models leave one.
        error: Why there were no more, if something was wrong.
    """

    injected: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    waiting: list[PlannedFault] = field(default_factory=list)
    error: GeminiError | None = None

    def __str__(self) -> str:
        kinds = sorted({*self.injected, *self.missed})
        words = [
            f"{self.injected[kind]} {kind}" + (f" ({self.missed[kind]} missed)" if self.missed[kind] else "")
            for kind in kinds
        ]
        trouble = "" if self.error is None else f"; then no more: {self.error}"
        return "faults: " + (", ".join(words) or "none") + trouble


class _OverError(Exception):
    """The job has ended, or the driver is to end."""


class FaultDriver:
    """Injects what a model plans until the model or the job ends; everything that lasts is taken back then.

    Args:
        run_dir: The job's run directory; the job may still be about to start.
        model: Plans the faults.
        seed: Of the plan, and of what a plan leaves open.
        until_s: Injects nothing any more after so many seconds.
        patience_s: How long a fault waits for a victim, if its time is not fixed.

    Attributes:
        counts: What it did up to now.
        over: Set when the thread that `start` began has ended.
    """

    def __init__(
        self, run_dir: Path, model: FailureModel, seed: int, *, until_s: float = float("inf"), patience_s: float = 60.0
    ) -> None:
        self._run_dir, self._model, self._seed = run_dir, model, seed
        self._until_s, self._patience_s = until_s, patience_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.counts = FaultCounts()
        self.over = threading.Event()

    def start(self) -> None:
        """Begins, on a thread of its own."""
        self._thread = threading.Thread(target=self._run_on_thread, name="faults", daemon=True)
        self._thread.start()

    def close(self) -> FaultCounts:
        """Ends it, within seconds, and takes back what lasts; idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30.0)
        return self.counts

    def _run_on_thread(self) -> None:
        try:
            self.run()
        except GeminiError as error:
            self.counts.error = error
            _log.error("no more faults: %s", error)
        finally:
            self.over.set()

    def run(self) -> FaultCounts:
        """Injects until the model, the time or the job ends.

        Raises:
            ConfigurationError: The job has nothing that the model could hit.
        """
        try:
            job = self._await_job()
        except _OverError:
            return self.counts
        with Observer(job, timeout_s=2.0) as observer, FaultInjector(job, random.Random(self._seed + 1)) as injector:
            try:
                _Drive(self, observer, injector).go()
            except _OverError:
                pass
            finally:
                injector.close()
                self._summarise(Path(job["run_dir"]))
        return self.counts

    def _await_job(self) -> dict[str, Any]:
        while not (self._run_dir / JOB_FILE).exists():
            if self._stop.wait(_POLL_S):
                raise _OverError
        return find_job(self._run_dir)

    def _summarise(self, run_dir: Path) -> None:
        counts = {"injected": dict(self.counts.injected), "missed": dict(self.counts.missed)}
        waiting = [fault.kind for fault in self.counts.waiting]
        EventLog(run_dir / EVENTS_FILE).append("faults_summary", **counts, waiting=waiting, seed=self._seed)


class _Drive:
    """One job under one model."""

    def __init__(self, driver: FaultDriver, observer: Observer, injector: FaultInjector) -> None:
        self._driver, self._observer, self._injector = driver, observer, injector
        self._watch = RecoveryWatch()
        self._began = self._last = time.monotonic()

    def go(self) -> None:
        targets = find_targets(self._observer, self._driver._model.kinds, self._pause)
        self._began = self._last = time.monotonic()
        draws = random.Random(self._driver._seed)
        trace = self._driver._run_dir / TRACE_FILE
        trace.unlink(missing_ok=True)
        for fault in self._driver._model.faults(targets, draws):
            self._driver.counts.waiting = [fault]
            self._await_moment(fault)
            append_line(trace, format_trace([fault]).rstrip())
            self._carry_out(fault)
            self._driver.counts.waiting = []
        while self._injector.lasting:
            self._pause()

    def _pause(self) -> None:
        """A little while, in which lasting faults go on."""
        self._injector.poll()
        over = self._driver._stop.wait(_POLL_S) or time.monotonic() - self._began > self._driver._until_s
        if over or start_time(self._observer.job["launcher_pid"]) != self._observer.job["launcher_start_time"]:
            raise _OverError

    def _look(self) -> Sighting:
        seen = self._observer.look(without=self._injector.stopped_nodes)
        self._watch.see(seen, time.monotonic(), calm=not self._injector.lasting)
        return seen

    def _await_moment(self, fault: PlannedFault) -> None:
        persistent = self._driver._run_dir / "persistent" / "latest"
        while not self._has_come(fault) or (fault.needs_persistent and not persistent.exists()):
            self._pause()

    def _has_come(self, fault: PlannedFault) -> bool:
        now = time.monotonic()
        if fault.time_s is not None:
            return now - self._began >= fault.time_s
        if fault.after_s is not None:
            return now - self._last >= fault.after_s
        if fault.at_step is not None:
            return self._look().step >= fault.at_step
        if fault.calm_s is not None:
            self._look()
            return self._watch.calm_since is not None and now - self._watch.calm_since >= fault.calm_s
        return True

    def _carry_out(self, fault: PlannedFault) -> None:
        deadline = time.monotonic() + (0.0 if fault.time_s is not None else self._driver._patience_s)
        while True:
            seen = self._look()
            try:
                event = self._injector.inject(fault, seen, ready=fault.after_s is None and fault.time_s is None)
            except NoVictimError as reason:
                if time.monotonic() >= deadline:
                    self._driver.counts.missed[fault.kind] += 1
                    self._injector.miss(fault, str(reason))
                    break
            else:
                _log.info("fault: %s", event)
                self._driver.counts.injected[fault.kind] += 1
                self._watch.hit(fault.kind, seen)
                break
            self._pause()
        self._last = time.monotonic()
