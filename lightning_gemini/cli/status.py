"""``lightning-gemini status``: nodes, root, generation, steps, versions, and who holds what."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("status", help="show nodes, root, versions and who holds what")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run (default: the newest)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=status)


def status(chosen: argparse.Namespace) -> int:
    """Prints the state of a job."""
    from lightning_gemini.controlplane.faults.observer import Observer
    from lightning_gemini.controlplane.run_directory import find_job

    job = find_job(chosen.run_dir)
    with Observer(job) as observer:
        seen = observer.look() if job["alive"] else None
    nodes = list(seen.statuses) if seen else []
    root = next((node["root"] for node in nodes if node and node.get("root") is not None), None)
    if chosen.json:
        print(json.dumps({**job, "root": root, "status": nodes}, indent=1))
        return 0
    generation = f", generation {seen.generation}, step {seen.step}" if seen else ""
    print(f"job {job['job']} ({'running' if job['alive'] else 'ended'}){generation}")
    print(
        f"{job['nodes']} nodes × {job['nproc_per_node']} ranks, script {job['script'][0]}, "
        f"run directory {job['run_dir']}"
    )
    if nodes:
        print_table(HEADER, [_row(rank, node, root) for rank, node in enumerate(nodes)])
        print_standbys(next((node for node in nodes if node), {}))
    return 0


HEADER = ("node", "agent", "root", "workers (rank:pid)", "step", "own shards", "replicas held", "memory")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as their content."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_standbys(node: dict[str, Any]) -> None:
    """Prints who stands by, as one node sees it."""
    root = node.get("root_name")
    shown = [
        f"{each['name']} (pid {each['pid']}{', root' if each['name'] == root else ''})"
        for each in node.get("standbys", [])
    ]
    if shown:
        print(f"standing by: {', '.join(shown)}")


def _row(rank: int, node: dict[str, Any] | None, root: int | None) -> tuple[str, ...]:
    if node is None:
        return (str(rank), "no answer", *("" for _ in HEADER[2:]))
    workers = " ".join(f"{worker['rank']}:{worker['pid']}" for worker in node["workers"]) or "-"
    steps = [int(step) for step in node["progress"].values()]
    held_bytes = sum(int(holding["bytes"]) for holding in node["holdings"])
    return (
        str(rank),
        f"pid {node['pid']}",
        "root" if rank == root else "",
        workers,
        str(min(steps)) if steps else "-",
        _holdings(node, "owner"),
        _holdings(node, "replica"),
        f"{held_bytes / 2**20:.1f} MiB",
    )


def _holdings(node: dict[str, Any], role: str) -> str:
    """Lists the complete versions: ``rank 3: 12 11``, newest first."""
    versions: dict[int, list[tuple[int, int]]] = {}
    for holding in node["holdings"]:
        if holding["role"] == role and holding["complete"]:
            versions.setdefault(holding["owner"], []).append((holding["generation"], holding["version"]))
    shown = [
        f"{owner}: " + " ".join(str(v) for _, v in sorted(found, reverse=True)) for owner, found in versions.items()
    ]
    return "; ".join(sorted(shown)) or "-"
