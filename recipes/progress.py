"""What a running job has reached, read from its files, and a terminal line that shows it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lightning_gemini.controlplane.events import EVENTS_FILE, read_events

_PLAIN_EVERY_S = 5.0


class Progress:
    """Follows the step counter and the events of one run.

    Args:
        run_dir: The run directory; need not be there yet.
        steps: Steps of the whole run.

    Attributes:
        step: The lowest step that every rank completed last.
    """

    def __init__(self, run_dir: Path, steps: int) -> None:
        self._run_dir, self._steps, self._began = run_dir, steps, time.monotonic()
        self.step, self._loss = 0, 0.0
        self._events_seen, self._fault_time = 0, 0.0
        self._world_size, self._restored = 0, list[dict[str, Any]]()
        self._state = "starting"

    def update(self) -> Iterator[str]:
        """Reads what is new; yields a line for everything worth telling."""
        events = list(read_events(self._run_dir / EVENTS_FILE))
        for event in events[self._events_seen :]:
            yield from self._told_by(event)
        self._events_seen = len(events)
        self._read_steps()

    def line(self) -> str:
        """The present, in a line."""
        seconds = time.monotonic() - self._began
        loss = f"  loss {self._loss:.3f}" if self.step else ""
        return f"{self._state:<9} step {self.step:3d}/{self._steps}{loss}  {seconds:5.1f} s"

    def _read_steps(self) -> None:
        last = [_last_record(path) for path in sorted((self._run_dir / "steps").glob("rank*.jsonl"))]
        known = [record for record in last if record is not None]
        if known and len(known) == self._world_size:
            step = min(record["step"] for record in known)
            if step != self.step:
                self._state = "training"
            self.step, self._loss = step, float(known[0]["loss"])

    def _told_by(self, event: dict[str, Any]) -> Iterator[str]:
        name = event["event"]
        if name == "job_started":
            self._world_size = event["world_size"]
        elif name == "fault_injected":
            self._fault_time, self._restored, self._state = event["time"], [], "stopped"
            yield _strike(event)
        elif name == "failure_detected":
            after = f" {max(0.0, event['time'] - self._fault_time):.2f} s later" if self._fault_time else ""
            self._state = "recovering"
            yield f"  noticed{after}: {event['detail']}"
        elif name == "restored":
            self._restored = [e for e in self._restored if e["generation"] == event["generation"]] + [event]
            if len(self._restored) == self._world_size:
                yield self._recovery()

    def _recovery(self) -> str:
        tiers = Counter(str(event["tier"]).replace("_", " ") for event in self._restored)
        ranks = ", ".join(f"{count} from {tier}" for tier, count in sorted(tiers.items()))
        seconds = max(event["time"] for event in self._restored) - self._fault_time
        return f"  back at version {self._restored[0]['version']} after {seconds:.1f} s; ranks restored: {ranks}"


class Screen:
    """Lines on the terminal, the last of them rewritten in place where the terminal can.

    Args:
        title: Stands before every line.
        out: The terminal, or a file.
    """

    def __init__(self, title: str, out: TextIO | None = None) -> None:
        self._out = out if out is not None else sys.stdout
        self._title, self._live, self._shown = title, self._out.isatty(), 0.0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._write(line, stays=True)

    def show(self, line: str) -> None:
        """A line that the next one replaces; now and then on what is no terminal."""
        if self._live or time.monotonic() - self._shown >= _PLAIN_EVERY_S:
            self._shown = time.monotonic()
            self._write(line, stays=not self._live)

    def done(self, line: str) -> None:
        """The last line."""
        self._write(line, stays=True)

    def _write(self, line: str, *, stays: bool) -> None:
        text = f"[{self._title}] {line}"
        if self._live and not stays:
            text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be rewritten
        self._out.write(f"\r\x1b[K{text}" if self._live else text)
        self._out.write("\n" if stays else "")
        self._out.flush()


def _strike(event: dict[str, Any]) -> str:
    victims = {"software": "worker of node", "hardware": "node", "root": "root, node", "etcd": "a member of etcd"}
    nodes = ", ".join(str(node) for node in event["nodes"])
    what = f"{victims.get(event['kind'], event['kind'] + ', nodes')} {nodes}".rstrip()
    return f"{event['signal'] or event['kind']} to {what} at step {event['at_step']} (pids {event['pids']})"


def _last_record(path: Path) -> dict[str, Any] | None:
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else None
