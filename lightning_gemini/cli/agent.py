"""``lightning-gemini agent``: what runs on every machine of a job, whoever provides it."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import Any

from lightning_gemini.errors import ConfigurationError


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "agent",
        help="make this machine part of a job (operators run this)",
        description="Makes this machine part of a job. What is not given comes from the environment: "
        "LIGHTNING_GEMINI_JOB, _ETCD, _SECRET (hexadecimal) or _SECRET_FILE, _MACHINE, _HOST, _DOMAIN.",
    )
    env = {name: os.environ.get(f"LIGHTNING_GEMINI_{name}") for name in ("JOB", "ETCD", "MACHINE", "HOST")}
    secret_file = os.environ.get("LIGHTNING_GEMINI_SECRET_FILE")
    parser.add_argument("--job", default=env["JOB"], metavar="J", help="the job's id, as `run` prints it")
    parser.add_argument("--etcd", default=env["ETCD"], metavar="HOST:PORT[,…]", help="its key-value store")
    parser.add_argument("--secret-file", type=Path, default=secret_file, metavar="F", help="file with its secret")
    parser.add_argument(
        "--name",
        default=env["MACHINE"],
        metavar="NAME",
        help="this machine's name, unique in the job (default: host-pid)",
    )
    parser.add_argument(
        "--host", default=env["HOST"], metavar="ADDR", help="where others reach it (default: found out)"
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's directory, if it is elsewhere here")
    parser.add_argument("--wait", type=float, default=60.0, metavar="S", help="wait so long for the job to be there")
    parser.add_argument("--parent", type=int, metavar="PID", help="end with this process, its parent")
    parser.add_argument("--launcher", metavar="ID", help=argparse.SUPPRESS)  # what `identity_of` says of the launcher
    parser.set_defaults(command=agent)


def agent(chosen: argparse.Namespace) -> int:
    """Serves the job; returns the exit code."""
    from lightning_gemini.controlplane.agent_main import Invitation, serve
    from lightning_gemini.controlplane.processes import die_with_parent

    if chosen.parent is not None:
        die_with_parent(chosen.parent)
    for option, value in (("--job", chosen.job), ("--etcd", chosen.etcd)):
        if not value:
            raise ConfigurationError(f"an agent must know its job: give {option}, or the variable for it")
    invitation = Invitation(
        job=chosen.job,
        etcd=chosen.etcd,
        secret=_secret(chosen.secret_file),
        name=chosen.name or f"{socket.gethostname()[:40]}-{os.getpid()}",
        host=chosen.host,
        run_dir=chosen.run_dir,
        domain=os.environ.get("LIGHTNING_GEMINI_DOMAIN", ""),
        wait_s=chosen.wait,
        launcher=chosen.launcher,
    )
    return serve(invitation)


def _secret(path: Path | None) -> bytes:
    # Workers and whatever they start need not inherit it.
    text = os.environ.pop("LIGHTNING_GEMINI_SECRET", None)
    try:
        secret = bytes.fromhex(path.read_text() if path is not None else text or "")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the job's secret ({error}): give --secret-file") from error
    if not secret:
        raise ConfigurationError(
            "an agent must know its job's secret: give --secret-file, or the variable LIGHTNING_GEMINI_SECRET"
        )
    return secret
