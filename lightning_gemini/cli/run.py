"""``lightning-gemini run``: train a script on a cluster that survives failures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gemini.config import ClusterConfig
from lightning_gemini.core.fault import Targets

if TYPE_CHECKING:
    from lightning_gemini.controlplane.faults import FaultDriver
    from lightning_gemini.controlplane.launcher import RunSettings


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("run", help="start a cluster and train a script on it")
    parser.add_argument(
        "--local-nodes",
        "--nodes",
        dest="nodes",
        type=int,
        default=1,
        metavar="N",
        help="machines of the job; those of --operator local are made of this host",
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="P", help="ranks on each machine")
    parser.add_argument("--standby", type=int, default=0, metavar="K", help="machines that stand by on top of them")
    parser.add_argument(
        "--operator",
        default="local",
        metavar="NAME[,K=V…]",
        help="who provides machines: local, command, slurm, kubernetes, aws; with settings of conf/gemini/operator",
    )
    parser.add_argument("--domains", default="", metavar="D,D…", help="failure domain of each machine, repeated")
    parser.add_argument(
        "--failure", default="none", metavar="NAME[,K=V…]", help="faults to inject, as conf/gemini/failure says"
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="logs and events (default: runs/<time>)")
    parser.add_argument("--etcd", metavar="HOST:PORT[,…]", help="a running etcd (default: start one)")
    parser.add_argument("--etcd-members", type=int, default=1, metavar="N", help="members of the one started: 1 or 3")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDR",
        help="address of this host where it listens (default: %(default)s)",
    )
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
        "--report-timeout",
        type=float,
        default=default.report_timeout_s,
        metavar="S",
        help="seconds that a live machine gets to say what it holds before it is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--preload", default="", metavar="MOD,MOD", help="modules that the warm pool imports too, or none"
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    parser.set_defaults(command=run)


def run(chosen: argparse.Namespace) -> int:
    """Runs the job; returns the exit code."""
    from lightning_gemini.cli.choices import load_choice
    from lightning_gemini.controlplane.launcher import Launcher, RunSettings

    cluster = replace(
        ClusterConfig(),
        max_failures_without_progress=chosen.max_failures,
        lease_ttl_s=max(1, chosen.lease_ttl),
        report_timeout_s=chosen.report_timeout,
    )
    operator, operator_settings = load_choice("operator", chosen.operator)
    settings = RunSettings(
        script=chosen.script,
        arguments=tuple(chosen.arguments),
        nodes=chosen.nodes,
        nproc_per_node=chosen.nproc_per_node,
        standby=chosen.standby,
        run_dir=chosen.run_dir,
        etcd=chosen.etcd,
        etcd_members=chosen.etcd_members,
        host=chosen.host,
        preload=_words(chosen.preload),
        operator=operator,
        operator_settings=operator_settings,
        domains=_words(chosen.domains),
        cluster=cluster,
    )
    return Launcher(settings, _faults(chosen.failure, settings)).run()


def _faults(choice: str, settings: RunSettings) -> Callable[[Path], FaultDriver] | None:
    """Returns what starts the fault driver; refuses at once what the job has nothing for."""
    from lightning_gemini.cli.choices import load_choice
    from lightning_gemini.controlplane.faults import FaultDriver
    from lightning_gemini.controlplane.faults.models import make_model

    _, chosen = load_choice("failure", choice)
    model = make_model(chosen)
    members = settings.etcd_members if settings.etcd is None else 0
    shape = Targets(settings.nodes, settings.nproc_per_node, tuple(settings.slot_domains()), ((0,),), members)
    for kind in model.kinds:
        shape.units(kind)
    return (lambda run_dir: FaultDriver(run_dir, model, int(chosen["seed"]))) if model.kinds else None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
