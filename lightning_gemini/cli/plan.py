"""``lightning-gemini plan``: who would hold what, how likely memory survives, and what else one could choose."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Mapping
from typing import Any

from lightning_gemini.config import PLACEMENTS
from lightning_gemini.core.host_memory import BYTES_PER_PARAMETER
from lightning_gemini.errors import ConfigurationError

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {
    **{unit + end: 1000**power for power, unit in enumerate("_KMGT") if power for end in ("", "B")},
    **{unit + "IB": 1024**power for power, unit in enumerate("_KMGT") if power},
    **{"": 1, "B": 1},
}


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("plan", help="show a placement, how likely it survives, and the memory it needs")
    parser.add_argument("--machines", type=int, required=True, metavar="N", help="machines of the job")
    parser.add_argument("--replicas", type=int, default=2, metavar="M", help="copies of every shard (default: 2)")
    parser.add_argument("--placement", default="mixed", choices=PLACEMENTS, help="strategy (default: mixed)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--domains", metavar="A,A,B,B", help="failure domain of every machine, in order")
    where.add_argument("--racks", type=int, metavar="R", help="R racks of machines that follow each other")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--params", metavar="P", help=f"parameters, as 1.5B: {BYTES_PER_PARAMETER} bytes each")
    size.add_argument("--checkpoint-bytes", metavar="C", help="checkpoint bytes of the whole job, as 18G or 16GiB")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="P", help="ranks on each machine (default: 1)")
    parser.add_argument(
        "--failures", type=int, metavar="K", help="show up to K lost machines (default: 2m, at least 4)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=plan)


def plan(chosen: argparse.Namespace) -> int:
    """Prints the plan."""
    from lightning_gemini.cli.plan_report import PlanReport, PlanRequest
    from lightning_gemini.cli.plan_text import plan_text

    request = PlanRequest(
        machines=chosen.machines,
        replicas=chosen.replicas,
        strategy=chosen.placement,
        domains=_domains(chosen),
        checkpoint_bytes=_checkpoint_bytes(chosen),
        nproc_per_machine=_at_least_1("--nproc-per-node", chosen.nproc_per_node),
        failures=None if chosen.failures is None else _at_least_1("--failures", chosen.failures),
    )
    report = PlanReport.of(request, random.Random(0))
    print(json.dumps(report.to_json(), indent=1) if chosen.json else plan_text(report))
    return 0


def _domains(chosen: argparse.Namespace) -> tuple[str, ...] | None:
    if chosen.domains is not None:
        return tuple(label.strip() for label in chosen.domains.split(","))
    if chosen.racks is None:
        return None
    if not 1 <= chosen.racks <= max(1, chosen.machines):
        raise ConfigurationError(
            f"--racks must be between 1 and {max(1, chosen.machines)} (the number of machines), got {chosen.racks}"
        )
    return tuple(f"rack{machine * chosen.racks // chosen.machines}" for machine in range(chosen.machines))


def _checkpoint_bytes(chosen: argparse.Namespace) -> int | None:
    if chosen.params is not None:
        return BYTES_PER_PARAMETER * _amount("--params", chosen.params, _COUNTS, "1.5B or 350M")
    if chosen.checkpoint_bytes is None:
        return None
    return _amount("--checkpoint-bytes", chosen.checkpoint_bytes, _BYTES, "18G or 16GiB")


def _amount(option: str, text: str, units: Mapping[str, int], examples: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    amount = round(float(match[1]) * units.get(match[2].upper(), 0)) if match else 0
    if amount < 1:
        raise ConfigurationError(f"{option} must be a positive number, perhaps with a unit ({examples}), got {text!r}")
    return amount


def _at_least_1(option: str, value: int) -> int:
    if value < 1:
        raise ConfigurationError(f"{option} must be 1 or more, got {value}")
    return value
