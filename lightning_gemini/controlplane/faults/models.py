"""Failure models from their settings, as ``conf/gemini/failure`` and the command line give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_gemini.core.failure_model import (
    FailureModel,
    PoissonModel,
    SequenceModel,
    SoakModel,
    TraceModel,
)
from lightning_gemini.core.fault import KINDS
from lightning_gemini.core.fault_trace import parse_trace
from lightning_gemini.errors import ConfigurationError


def make_model(settings: Mapping[str, Any]) -> FailureModel:
    """Makes a model.

    Args:
        settings: ``model`` (sequence, poisson, trace or soak) and the model's own settings; others are ignored.

    Raises:
        ConfigurationError: The model, a kind or a number is impossible, or the trace cannot be read.
    """
    makers: dict[str, Callable[[Mapping[str, Any]], FailureModel]] = {
        "sequence": _sequence,
        "poisson": _poisson,
        "trace": _trace,
        "soak": _soak,
    }
    name = settings.get("model")
    if name not in makers:
        raise ConfigurationError(f"a failure model must be one of {', '.join(makers)}, got {name!r}")
    try:
        return makers[name](settings)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"the failure model {name} cannot take {dict(settings)}: {error}") from error


def _sequence(settings: Mapping[str, Any]) -> FailureModel:
    kinds = tuple(str(kind) for kind in settings["kinds"])
    _check_kinds(kinds)
    stretch, repeat = int(settings.get("stretch", 20)), int(settings.get("repeat", 1))
    if stretch < 1 or repeat < 0:
        raise ConfigurationError(f"stretch must be 1 or more and repeat 0 or more, got {stretch} and {repeat}")
    return SequenceModel(
        kinds, stretch, repeat, _positive(settings, "lasts_s"), bool(settings.get("wait_for_persistent", True))
    )


def _poisson(settings: Mapping[str, Any]) -> FailureModel:
    rates = {kind: _positive(settings, kind, 0.0) for kind in KINDS}
    if not any(rates.values()):
        raise ConfigurationError(f"poisson needs a rate above 0 for one of {', '.join(KINDS)}: software=2")
    return PoissonModel(rates, _positive(settings, "lasts_s"))


def _trace(settings: Mapping[str, Any]) -> FailureModel:
    if not settings.get("file"):
        raise ConfigurationError("trace needs a file: trace,file=PATH")
    path = Path(str(settings["file"]))
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error}") from error
    return TraceModel(parse_trace(text, str(path)))


def _soak(settings: Mapping[str, Any]) -> FailureModel:
    weights = {kind: _positive(settings, kind, 0.0) for kind in KINDS}
    if not any(weights.values()):
        raise ConfigurationError(f"soak needs a weight above 0 for one of {', '.join(KINDS)}")
    bounds = {name: _bounds(settings, name) for name in ("calm_s", "overlap_s", "lasts_s")}
    overlap = _positive(settings, "overlap", 0.2)
    return SoakModel(weights, bounds["calm_s"], overlap, bounds["overlap_s"], bounds["lasts_s"])


def _check_kinds(kinds: tuple[str, ...]) -> None:
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigurationError(f"kinds must be of {', '.join(KINDS)}, got {unknown[0]!r}")


def _positive(settings: Mapping[str, Any], name: str, default: float = 3.0) -> float:
    value = float(settings.get(name, default))
    if not 0 <= value < float("inf"):
        raise ConfigurationError(f"{name} must be 0 or more, got {value}")
    return value


def _bounds(settings: Mapping[str, Any], name: str) -> tuple[float, float]:
    low, high = (float(bound) for bound in settings[name])
    if not 0 <= low <= high < float("inf"):
        raise ConfigurationError(f"{name} must be two growing numbers of seconds, got {low} and {high}")
    return low, high
