"""Whether the demo's report shows what it must, and how it reads on a terminal."""

from __future__ import annotations

from typing import Any

_MOST_LOST_STEPS = 2
"""One that had just ended, and one that carried no version because the network's idle time was being measured."""


def problems(report: dict[str, Any]) -> list[str]:
    """What the report shows that it must not: losses that differ, a recovery from elsewhere, too many steps lost."""
    world_size, nproc = report["world_size"], report["world_size"] // report["nodes"]
    found = [f"losses differ: {difference}" for difference in report["loss"]["differences"]]
    for failure in report["failures"]:
        lost = nproc * len(failure["nodes"]) if failure["kind"] == "hardware" else 0
        expected = {"local_memory": world_size - lost, "remote_memory": lost, "persistent": 0}
        if failure["kind"] == "group":
            expected = {"local_memory": 0, "remote_memory": 0, "persistent": world_size}
        what = f"{failure['kind']} failure at step {failure['at_step']}"
        if failure["tiers"] != expected:
            found.append(f"{what}: ranks restored from {failure['tiers']}, expected {expected}")
        if failure["kind"] != "group" and failure["lost_steps"] > _MOST_LOST_STEPS:
            found.append(f"{what}: {failure['lost_steps']} steps lost, expected at most {_MOST_LOST_STEPS}")
    return found


def table(report: dict[str, Any]) -> str:
    """The failures, one a line, with where each recovery came from and where its time went."""
    head = ("failure", "node", "at step", "resumed", "lost", "restored from", "detect", "restart", "restore", "total")
    rows = [head]
    for failure in report["failures"]:
        tiers = [f"{count} {tier.replace('_', ' ')}" for tier, count in failure["tiers"].items() if count]
        seconds = (f"{failure[f'{stage}_s']:.2f} s" for stage in ("detect", "restart", "restore", "total"))
        steps = (str(failure[name]) for name in ("at_step", "resumed_from_version", "lost_steps"))
        rows.append((failure["kind"], ",".join(map(str, failure["nodes"])), *steps, ", ".join(tiers), *seconds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def costs(report: dict[str, Any]) -> str:
    """What checkpoints cost, in one line."""
    cost = report["checkpoint"]
    replica = cost["replica_complete_s_median"]
    return (
        f"a checkpoint of {cost['bytes_per_rank'] / 2**20:.1f} MiB a rank every iteration: training stops for "
        f"{1e3 * cost['stall_s_median']:.1f} ms"
        + (f", its copy is safe on a peer after {1e3 * replica:.0f} ms" if replica is not None else "")
        + f"; iterations take {1e3 * cost['iteration_s_median']:.0f} ms, "
        f"without checkpoints {1e3 * cost['iteration_s_median_without']:.0f} ms"
    )
