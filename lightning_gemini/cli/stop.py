"""``lightning-gemini stop``: end a running job as Ctrl-C would, or the agents that plain scripts left behind."""

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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run-dir", type=Path, metavar="DIR", help="the run (default: the newest)")
    which.add_argument(
        "--agents",
        action="store_true",
        help="instead: agents that scripts started without `run` left, and their memory",
    )
    parser.set_defaults(command=stop)


def stop(chosen: argparse.Namespace) -> int:
    """Asks the launcher to end the job, or the agents to end, and waits until they have."""
    from lightning_gemini.controlplane.processes import wait_gone
    from lightning_gemini.controlplane.run_directory import find_job

    if chosen.agents:
        return stop_agents()
    job = find_job(chosen.run_dir)
    if not job["alive"]:
        print(f"job {job['job']} is not running")
        return 0
    os.kill(job["launcher_pid"], signal.SIGTERM)
    if wait_gone([job["launcher_pid"]], _TIMEOUT_S):
        raise AgentError(f"job {job['job']} did not end within {_TIMEOUT_S:.0f} s; kill pid {job['launcher_pid']}")
    print(f"job {job['job']} ended")
    return 0


def stop_agents() -> int:
    """Ends the agents of this user that no ``run`` looks after."""
    from lightning_gemini.controlplane.agent_client import AgentClient
    from lightning_gemini.controlplane.processes import wait_gone
    from lightning_gemini.controlplane.standalone import runtime_dir

    pids = []
    for path in sorted(runtime_dir().glob("*/agent-*.sock")):
        try:
            with AgentClient(path, path.parent.name) as agent:
                pids.append(int(agent.identity["pid"]))
                agent.stop()
        except AgentError as error:
            print(error)
    if wait_gone(pids, _TIMEOUT_S):
        raise AgentError(f"some of the agents {pids} did not end within {_TIMEOUT_S:.0f} s")
    print(f"{len(pids)} agents ended")
    return 0
