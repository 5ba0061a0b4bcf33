"""The event log: one file a run, one JSON object a line, written by every process of the job."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
_lost_lines = 0


@dataclass(frozen=True, slots=True)
class EventLog:
    """Appends events to a file that many processes share.

    Every event is one ``write`` to a file opened with ``O_APPEND``, so lines of different processes never mix,
    and a process that is killed leaves whole lines only.

    Attributes:
        path: The run's ``events.jsonl``; ``None`` drops every event (a job that no run directory belongs to).
        node: Machine rank of the writer, if it has one.
        rank: Global rank of the writer, if it is a worker.
        generation: Generation of the writer; each event may name another one.
    """

    path: Path | None
    node: int | None = None
    rank: int | None = None
    generation: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> EventLog:
        """Builds the log of a worker from the variables that its agent gave it.

        Args:
            environment: Variables to read; the process's own by default.

        Returns:
            A log that drops everything when the worker does not belong to a run.
        """
        env = os.environ if environment is None else environment
        run_dir, node, rank = (env.get(name) for name in ("LIGHTNING_GEMINI_RUN_DIR", "LIGHTNING_GEMINI_NODE", "RANK"))
        return cls(
            path=Path(run_dir) / EVENTS_FILE if run_dir else None,
            node=int(node) if node else None,
            rank=int(rank) if rank else None,
            generation=int(env.get("LIGHTNING_GEMINI_GENERATION", "0")),
        )

    def append(self, event: str, /, **fields: Any) -> dict[str, Any]:
        """Writes one event.

        Args:
            event: Name of the event, such as ``failure_detected``.
            **fields: The event's own fields, JSON-able. ``time``, ``node``, ``rank`` and ``generation`` replace the
                writer's; ``time`` (unix seconds) is for an event that happened before it could be written.

        Returns:
            The record as written.
        """
        record: dict[str, Any] = {
            "time": time.time(),
            "node": self.node,
            "rank": self.rank,
            "generation": self.generation,
            "event": event,
        }
        record.update(fields)
        if self.path is not None:
            append_line(self.path, json.dumps(record, default=str))
        return record


def append_line(path: Path, line: str) -> None:
    """Appends one line in a single write, so that it never mixes with those of other processes.

    A disk that is full or gone loses lines, and stops neither training nor recovery: said once, on standard error,
    since the log is on that disk too.
    """
    global _lost_lines
    data = line.encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _lost_lines:
                os.write(descriptor, b"\n")  # ends what the last one may have begun
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        _lost_lines = 0
    except OSError as error:
        _lost_lines += 1
        if _lost_lines == 1:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"lightning-gemini: {path} cannot be written ({error}); events are lost meanwhile\n")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a file in the order of their lines; a last line still being written is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                with contextlib.suppress(ValueError):  # a full disk cut it short
                    yield json.loads(line)
