"""``lightning-gemini stop``: end a running job as Ctrl-C would."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from lightning_gemini.errors import AgentError

_TIMEOUT_S = 30.0


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("stop", help="end a job, and everything that belongs to it")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run (default: the newest)")
    parser.set_defaults(command=stop)


def stop(chosen: argparse.Namespace) -> int:
    """Asks the launcher to end the job and waits until it has."""
    from lightning_gemini.controlplane.processes import wait_gone
    from lightning_gemini.controlplane.run_directory import find_job

    job = find_job(chosen.run_dir)
    if not job["alive"]:
        print(f"job {job['job']} is not running")
        return 0
    os.kill(job["launcher_pid"], signal.SIGTERM)
    if wait_gone([job["launcher_pid"]], _TIMEOUT_S):
        raise AgentError(f"job {job['job']} did not end within {_TIMEOUT_S:.0f} s; kill pid {job['launcher_pid']}")
    print(f"job {job['job']} ended")
    return 0
