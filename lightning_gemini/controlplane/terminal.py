"""What a person sees while a job runs: rank 0's output as it is, and a line for whatever matters besides."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.events import EVENTS_FILE

_TAIL_LINES = 25


class FileTail:
    """Reads what was appended to a file since the last call; the file may appear later."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._rest = path, 0, b""

    def read(self) -> bytes:
        """Returns the new bytes."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                found = file.read()
        except FileNotFoundError:
            return b""
        self._position += len(found)
        return found

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields the new whole lines, as JSON."""
        *lines, self._rest = (self._rest + self.read()).split(b"\n")
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


class Terminal:
    """Follows a run directory.

    Args:
        run_dir: The run's directory.
        world_size: Ranks of the job.
    """

    def __init__(self, run_dir: Path, world_size: int) -> None:
        self._run_dir, self._world_size = run_dir, world_size
        self._rank0 = FileTail(run_dir / "logs" / "node0-rank0.out")
        self._events = FileTail(run_dir / EVENTS_FILE)
        self._logs: dict[Path, FileTail] = {}
        self._said: set[str] = set()
        self._restored: dict[int, list[dict[str, Any]]] = {}
        self._exits: list[dict[str, Any]] = []
        self._started = False

    def refresh(self) -> None:
        """Shows what is new."""
        output = self._rank0.read()
        if output:
            sys.stdout.buffer.write(output)
            sys.stdout.flush()
        for event in self._events.records():
            self._show(event)
        self._show_warnings()

    def say(self, message: str) -> None:
        """Writes one line of our own."""
        sys.stderr.write(f"[lightning-gemini] {message}\n")
        sys.stderr.flush()

    def show_failure(self) -> None:
        """Shows the last output of the rank that failed first, if it is not rank 0, which was shown all along."""
        first = min(self._exits, key=lambda leave: (leave["code"] is None, leave["time"]), default=None)
        if first is None or first["rank"] == 0:
            return
        path = self._run_dir / "logs" / f"node{first['node']}-rank{first['rank']}.out"
        if path.exists():
            self.say(f"last lines of rank {first['rank']} ({path}):")
            lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            sys.stderr.write("".join(f"    {line}\n" for line in lines or ["(no output)"]))
            sys.stderr.flush()

    def _show(self, event: dict[str, Any]) -> None:
        name = event["event"]
        if name == "generation_started":
            self._exits.clear()
            self._started = True
            self.say(_describe_generation(event))
        elif name == "failure_detected":
            self.say(f"{event['kind']} failure: {event['detail']}")
        elif name == "member_joined" and self._started:
            self.say(f"{event['name']} has node {event['node']} now")
        elif name == "fault_injected":
            self.say(f"injected: {event['signal']} to {event['kind']} of node {event['node']} (pids {event['pids']})")
        elif name == "worker_exit" and not event["expected"] and event["code"] != 0:
            self._exits.append(event)
        elif name == "restored":
            self._count_restored(event)

    def _count_restored(self, event: dict[str, Any]) -> None:
        restored = self._restored.setdefault(event["generation"], [])
        restored.append(event)
        if len(restored) == self._world_size:
            tiers = Counter(str(each.get("tier")) for each in restored)
            shown = ", ".join(f"{count} from {tier}" for tier, count in sorted(tiers.items()))
            slowest = max(float(each.get("seconds") or 0.0) for each in restored)
            self.say(f"all ranks restored version {event.get('version')} in {slowest:.2f} s: {shown}")

    def _show_warnings(self) -> None:
        for path in (self._run_dir / "logs").glob("*.jsonl"):
            for record in self._logs.setdefault(path, FileTail(path)).records():
                worth = record["level"] in ("WARNING", "ERROR", "CRITICAL") and record["message"] not in self._said
                if worth:
                    self._said.add(record["message"])
                    self.say(f"{record['level'].lower()} ({path.stem}): {record['message']}")


def _describe_generation(event: dict[str, Any]) -> str:
    plan, nodes = event["plan"], len(event["members"])
    if plan["id"] is None:
        return f"generation {event['generation']} starts on {nodes} nodes; nothing in memory to resume from"
    tiers = ", ".join(f"{count} from {tier}" for tier, count in sorted(Counter(plan["tiers"]).items()))
    return f"generation {event['generation']} starts on {nodes} nodes at version {plan['id']['version']}: {tiers}"
