"""``lightning-gemini run``: train a script on a local cluster that survives failures."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_gemini.config import ClusterConfig


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("run", help="start a cluster and train a script on it")
    parser.add_argument("--local-nodes", type=int, default=1, metavar="N", help="machines to make of this host")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="P", help="ranks on each machine")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="logs and events (default: runs/<time>)")
    parser.add_argument("--etcd", metavar="HOST:PORT", help="a running etcd (default: start one)")
    default = ClusterConfig()
    parser.add_argument(
        "--max-failures",
        type=int,
        default=default.max_failures_without_progress,
        metavar="K",
        help="give up after more than K recoveries in a row that complete no new step (default: %(default)s)",
    )
    parser.add_argument(
        "--lease-ttl",
        type=int,
        default=default.lease_ttl_s,
        metavar="S",
        help="seconds of silence after which a machine counts as dead (default: %(default)s)",
    )
    parser.add_argument(
        "--preload", default="", metavar="MOD,MOD", help="modules that the warm pool imports too, or none"
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    parser.set_defaults(command=run)


def run(chosen: argparse.Namespace) -> int:
    """Runs the job; returns the exit code."""
    from lightning_gemini.controlplane.launcher import Launcher, RunSettings

    cluster = replace(
        ClusterConfig(), max_failures_without_progress=chosen.max_failures, lease_ttl_s=max(1, chosen.lease_ttl)
    )
    settings = RunSettings(
        script=chosen.script,
        arguments=tuple(chosen.arguments),
        nodes=chosen.local_nodes,
        nproc_per_node=chosen.nproc_per_node,
        run_dir=chosen.run_dir,
        etcd=chosen.etcd,
        preload=tuple(name for name in chosen.preload.split(",") if name),
        cluster=cluster,
    )
    return Launcher(settings).run()
