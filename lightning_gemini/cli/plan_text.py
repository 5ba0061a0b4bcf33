"""What ``lightning-gemini plan`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from lightning_gemini.cli.plan_report import Choice, PlanReport
from lightning_gemini.core.host_memory import BYTES_PER_PARAMETER
from lightning_gemini.core.survival import Odds, corollary_bound

_SHOWN_MACHINES = 16
_SHOWN_DIGITS = 24


def plan_text(report: PlanReport) -> str:
    """The report for people: groups, probabilities, memory, and other choices."""
    parts = (_head(report), _odds(report), _memory(report), _alternatives(report))
    return "\n\n".join("\n".join(part) for part in parts)


def _head(report: PlanReport) -> Iterator[str]:
    asked, placement = report.request, report.chosen.placement
    ranks = f" x {asked.nproc_per_machine} ranks" if asked.nproc_per_machine > 1 else ""
    sets = len(placement.distinct_holder_sets)
    yield f"{asked.machines} machines{ranks}, replicas {asked.replicas}, placement {asked.strategy}: {sets} holder sets"
    shown = placement.groups[:_SHOWN_MACHINES]
    rest = len(placement.groups) - len(shown)
    yield "groups  " + " ".join(map(_group, shown)) + (f" and {rest} more" if rest else "")
    longest = max(placement.groups, key=len)
    if len(longest) > asked.replicas:
        for owner in longest[:_SHOWN_MACHINES]:
            yield f"  shards of machine {owner}: on {', '.join(map(str, placement.holders(owner)))}"
    if asked.domains is not None:
        spread = [len({asked.domains[machine] for machine in holders}) for holders in placement.holder_sets]
        yield f"holders of a shard are in {min(spread)} to {max(spread)} of {len(set(asked.domains))} failure domains"


def _odds(report: PlanReport) -> Iterator[str]:
    asked, chosen = report.request, report.chosen
    bounds = {} if asked.strategy == "ring" else _bounds(report)  # more sets than the corollary counts
    rows = [(str(k), *_odds_cells(odds), bounds.get(k, "")) for k, odds in chosen.by_machines.items()]
    yield from _table(("machines lost", "memory serves all", "", "at least (Corollary 1)" * bool(bounds)), rows)
    if chosen.by_domains:
        yield ""
        rows = [(str(k), *_odds_cells(odds), "") for k, odds in chosen.by_domains.items()]
        yield from _table(("domains lost", "memory serves all", "", ""), rows)


def _bounds(report: PlanReport) -> dict[int, str]:
    asked = report.request
    return {k: _decimal(corollary_bound(asked.machines, asked.replicas, k)) for k in report.chosen.by_machines}


def _memory(report: PlanReport) -> Iterator[str]:
    asked, memory = report.request, report.chosen.memory_bytes
    start = f"host memory  2 buffers x {asked.replicas} replicas x "
    if memory is None or asked.checkpoint_bytes is None:
        yield f"{start}the checkpoint bytes of a machine"
        yield f"             ({BYTES_PER_PARAMETER} bytes a parameter, over all machines; try --params 1.5B)"
        return
    share = -(-asked.checkpoint_bytes // asked.machines)
    rank = -(-share // asked.nproc_per_machine)
    yield f"{start}{_size(share)} = {_size(memory)} a machine"
    yield f"             (a checkpoint of {_size(asked.checkpoint_bytes)} in all, {_size(rank)} a rank)"


def _alternatives(report: PlanReport) -> Iterator[str]:
    lost = list(report.others[0].by_machines)
    domains = list(report.others[0].by_domains)[:2]
    header = (
        *("replicas", "placement", "holder sets"),
        *(f"{k} lost" for k in lost),
        *(f"{k} domain{'s' * (k > 1)}" for k in domains),
        "host memory",
    )
    yield from _table(header, [_alternative(report, choice, domains) for choice in report.others])


def _alternative(report: PlanReport, choice: Choice, domains: Sequence[int]) -> tuple[str, ...]:
    asked = report.request
    here = choice.replicas == asked.replicas and asked.strategy in choice.names
    return (
        f"{choice.replicas}{' *' * here}",
        ", ".join(choice.names),
        str(len(choice.placement.distinct_holder_sets)),
        *(_short(odds) for odds in choice.by_machines.values()),
        *(_short(choice.by_domains[k]) for k in domains),
        f"{2 * choice.replicas} shares" if choice.memory_bytes is None else _size(choice.memory_bytes),
    )


# -- numbers -----------------------------------------------------------------------------------------------------------


def _group(machines: Sequence[int]) -> str:
    shown = " ".join(map(str, machines[:_SHOWN_MACHINES]))
    return f"[{shown}{f' … {len(machines)} in all' if len(machines) > _SHOWN_MACHINES else ''}]"


def _odds_cells(odds: Odds) -> tuple[str, str]:
    if odds.exact is None:
        return f"estimate, 99 %: {odds.low:.4f} to {odds.high:.4f}", f"~{odds.value:.4f}"
    fraction = str(odds.exact)
    return fraction if len(fraction) <= _SHOWN_DIGITS else "", _decimal(odds.exact)


def _short(odds: Odds) -> str:
    return _decimal(odds.exact) if odds.exact is not None else f"~{odds.value:.3f}"


def _decimal(probability: Fraction) -> str:
    """Six digits; what is lost, where these would be all nines."""
    if probability in (0, 1):
        return str(probability)
    if Fraction(999_999, 1_000_000) < probability < 1:
        return f"1 - {float(1 - probability):.1e}"
    if 0 < probability < Fraction(1, 1_000_000):
        return f"{float(probability):.1e}"
    return f"{float(probability):.6f}"


def _size(size_bytes: int) -> str:
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
