"""``lightning-gemini inject``: do one fault to a running job, or drive a failure model against it."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_gemini.cli.choices import load_choice
from lightning_gemini.core.fault import ETCD, KINDS, LASTING, ROOT, PlannedFault
from lightning_gemini.errors import ConfigurationError

_WITHOUT_NODE = (ROOT, ETCD)


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    kinds = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser = commands.add_parser("inject", help="kill, stop, cut or corrupt something of a running job", epilog=kinds)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kind", choices=tuple(KINDS), help="one fault; see below")
    what.add_argument(
        "--model", metavar="NAME[,K=V…]", help="instead: faults of a model (conf/gemini/failure) until the job ends"
    )
    parser.add_argument("--node", type=int, action="append", metavar="I", help="repeat for several")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="global rank to kill (software; default: the node's first)"
    )
    parser.add_argument("--at-step", type=int, metavar="S", help="wait until every rank has completed step S")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long a pause or a cut link lasts (default: 3)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the model (default: the model's own)")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run (default: the newest)")
    parser.set_defaults(command=_command)


def inject(
    run_dir: Path | None,
    kind: str,
    node: int,
    rank: int | None = None,
    at_step: int | None = None,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Does one fault to one node, for example kills a worker, or agent, pool and workers with the node's memory.

    Args:
        run_dir: The run; the newest by default.
        kind: See `lightning_gemini.core.fault.KINDS`.
        node: Machine rank; for etcd: which member.
        rank: Global rank to kill (software); the node's first by default.
        at_step: As soon as every rank has completed this optimizer step; now by default.
        timeout_s: The longest wait for that step, and for workers to be there.

    Returns:
        The ``fault_injected`` event: ``pids``, ``signal``, ``at_step`` (the lowest step completed by all ranks).

    Raises:
        ConfigurationError: If there is no such job, node or rank.
        AgentError: If the step is not reached in time, or the job ended.
    """
    return inject_nodes(run_dir, kind, [node], rank, at_step, timeout_s)


def inject_nodes(
    run_dir: Path | None,
    kind: str,
    nodes: Sequence[int],
    rank: int | None = None,
    at_step: int | None = None,
    timeout_s: float = 600.0,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Does it to several nodes at the same moment, and waits until a fault that lasts is over; see `inject`.

    Args:
        run_dir: See `inject`, also for all that is not named here.
        kind: See `inject`.
        nodes: Machine ranks; none for the kinds that find their own.
        rank: See `inject`.
        at_step: See `inject`.
        timeout_s: See `inject`.
        seconds: How long a pause or a cut link lasts.
    """
    from lightning_gemini.controlplane.faults.single import inject_fault
    from lightning_gemini.controlplane.run_directory import find_job

    job = find_job(run_dir)
    _check(job, kind, nodes, rank)
    lasts_s = seconds if kind in LASTING else None
    fault = PlannedFault(kind, tuple(nodes), rank, at_step=at_step, lasts_s=lasts_s)
    return inject_fault(job, fault, random.Random(), timeout_s)


def _check(job: dict[str, Any], kind: str, nodes: Sequence[int], rank: int | None) -> None:
    if kind not in KINDS:
        raise ConfigurationError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not job["alive"]:
        raise ConfigurationError(f"job {job['job']} in {job['run_dir']} is not running")
    if (not nodes and kind not in _WITHOUT_NODE) or not all(0 <= node < job["nodes"] for node in nodes):
        raise ConfigurationError(f"the job has nodes 0 to {job['nodes'] - 1}, got {list(nodes)}: give --node")
    if nodes and kind == ROOT:
        raise ConfigurationError(f"root finds its own node, got {list(nodes)}: leave --node out")
    if rank is not None and (kind != "software" or rank // job["nproc_per_node"] not in nodes):
        raise ConfigurationError(f"--rank is for software failures, and rank {rank} must be on that node")


def _command(chosen: argparse.Namespace) -> int:
    with _ended_by_signals():
        if chosen.model is not None:
            return _drive(chosen.run_dir, chosen.model, chosen.seed)
        event = inject_nodes(
            chosen.run_dir, chosen.kind, chosen.node or [], chosen.rank, chosen.at_step, seconds=chosen.seconds
        )
        print(json.dumps(event))
        return 0


def _drive(run_dir: Path | None, model: str, seed: int | None) -> int:
    from lightning_gemini.controlplane.faults.driver import FaultDriver
    from lightning_gemini.controlplane.faults.models import make_model
    from lightning_gemini.controlplane.run_directory import find_job

    _, settings = load_choice("failure", model)
    job = find_job(run_dir)
    if not job["alive"]:
        raise ConfigurationError(f"job {job['job']} in {job['run_dir']} is not running")
    seed = int(settings.get("seed", 0)) if seed is None else seed
    driver = FaultDriver(Path(job["run_dir"]), make_model(settings), seed)
    try:
        driver.run()
    finally:
        print(f"seed {seed}; {driver.counts}")
    return 0


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns every polite way to end this process into an exception, so that what lasts is taken back."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
