"""From an operator's YAML to the dataclass of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from lightning_gemini.errors import ConfigurationError

T = TypeVar("T")

OF_THE_JOB = ("name", "nodes", "nproc_per_node")
"""In the same YAML files, but not the operator's."""


def read_settings(kind: type[T], operator: str, given: Mapping[str, Any]) -> T:
    """Makes an operator's settings; what is not given keeps its default.

    Raises:
        ConfigurationError: If there is no such setting, a required one is missing, or a value is impossible.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    values = {key: _frozen(value) for key, value in given.items() if key not in OF_THE_JOB}
    for key in values:
        if key not in known:
            raise ConfigurationError(f"operator {operator} has no setting {key!r}; it has: {', '.join(known)}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"operator {operator}: {error}") from error


def check_positive(operator: str, **values: float) -> None:
    """Refuses times that are not positive numbers.

    Raises:
        ConfigurationError: Naming the first.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigurationError(f"operator {operator}: {name} must be a positive number of seconds, got {value!r}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
