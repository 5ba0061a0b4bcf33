"""Faults as text, one a line, for replaying what happened somewhere, or in an earlier run.

::

    # when      kind      victims   options
    12.5        software  3
    step=40     hardware  0,1
    calm=2      pause     *         for=4.5
    after=0.1   etcd      2

``when`` is a time in seconds since the start, or ``step=N`` (all ranks completed step N), ``calm=S`` (S seconds after
the job recovered from what came before), ``after=S`` (S seconds after the fault before), or ``now``. Victims are
machine ranks, or etcd members; ``*`` has them drawn. Options: ``for=S`` (pause, link), ``rank=R`` (software),
``persistent`` (not before a persistent checkpoint exists). ``#`` begins a comment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_gemini.core.fault import PlannedFault
from lightning_gemini.errors import ConfigurationError

_MOMENTS = {"step": "at_step", "calm": "calm_s", "after": "after_s"}
_ANY = "*"


def parse_trace(text: str, source: str = "trace") -> tuple[PlannedFault, ...]:
    """Reads faults.

    Args:
        text: Lines as above.
        source: Name of the text for errors.

    Raises:
        ConfigurationError: A line is not as above; names the line.
    """
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            faults.append(_fault(words))
        except (ValueError, ConfigurationError) as error:
            raise ConfigurationError(
                f"{source}, line {number}: expected `SECONDS|step=N KIND VICTIMS [for=S] [rank=R]`, "
                f"found {line.strip()!r} ({error})"
            ) from error
    _check_order(faults, source)
    return tuple(faults)


def format_trace(faults: Iterable[PlannedFault]) -> str:
    """Writes faults so that `parse_trace` reads the very same ones."""
    return "".join(f"{_line(fault)}\n" for fault in faults)


def _fault(words: list[str]) -> PlannedFault:
    if len(words) < 2:
        raise ValueError("too short")
    when, kind, *rest = words
    fields = _moment(when)
    if rest and "=" not in rest[0] and rest[0] != "persistent":
        victims = rest.pop(0)
        fields["victims"] = () if victims == _ANY else tuple(int(word) for word in victims.split(","))
    for option in rest:
        fields.update(_option(option))
    return PlannedFault(kind, **fields)


def _moment(when: str) -> dict[str, Any]:
    name, equals, value = when.partition("=")
    if not equals:
        return {} if when == "now" else {"time_s": float(when)}
    if name not in _MOMENTS:
        raise ValueError(f"no such moment: {name}")
    return {_MOMENTS[name]: int(value) if name == "step" else float(value)}


def _option(option: str) -> dict[str, Any]:
    name, _, value = option.partition("=")
    if option == "persistent":
        return {"needs_persistent": True}
    if name == "for":
        return {"lasts_s": float(value)}
    if name == "rank":
        return {"rank": int(value)}
    raise ValueError(f"no such option: {option}")


def _line(fault: PlannedFault) -> str:
    moments = [(name, getattr(fault, field)) for name, field in _MOMENTS.items()]
    when = next((f"{name}={value!r}" for name, value in moments if value is not None), "now")
    words = [when if fault.time_s is None else repr(fault.time_s), fault.kind]
    words.append(",".join(map(str, fault.victims)) or _ANY)
    options = {"for": fault.lasts_s, "rank": fault.rank}
    words += [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return " ".join([*words, *(["persistent"] if fault.needs_persistent else [])])


def _check_order(faults: list[PlannedFault], source: str) -> None:
    times = [fault.time_s for fault in faults if fault.time_s is not None]
    if times != sorted(times):
        raise ConfigurationError(f"{source}: the seconds must not go back; sort the lines")
