"""SIGKILL to workers, to whole machines, and to members of the job's etcd."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.processes import children_of, start_time


def kill_processes(pids: Iterable[int], *, whole_groups: bool) -> list[int]:
    """Sends SIGKILL, and does not wait for the ends.

    Args:
        pids: In this order.
        whole_groups: Also to the process groups that they lead: with a machine its workers' own children die too.

    Returns:
        Those that were alive.
    """
    alive = [pid for pid in pids if start_time(pid) is not None]  # the death of the first may end the others
    for pid in alive:
        _send(os.kill, pid)
        if whole_groups:
            _send(os.killpg, pid)
    return alive


def etcd_members(job: dict[str, Any]) -> list[int]:
    """Returns the live members of the etcd that a job started for itself, in their order; none if it started none."""
    try:
        pids: list[int] = json.loads((Path(job["run_dir"]) / "etcd" / "pids.json").read_text())
    except (OSError, ValueError):
        return []
    children = set(children_of(job["launcher_pid"]))
    return [pid for pid in pids if pid in children and start_time(pid) is not None]


def _send(send: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(pid, signal.SIGKILL)
