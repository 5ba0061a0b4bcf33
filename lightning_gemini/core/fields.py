"""Reads typed fields out of JSON values, and refuses anything else.

Control messages come from other machines; a wrong field must end in one clear error and not in a ``KeyError`` deep
inside a decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gemini.errors import ProtocolError

__all__ = ["boolean", "integer", "integer_lists", "integers", "items", "mapping", "mappings", "strings"]


def integer(data: Mapping[str, Any], name: str) -> int:
    """Returns the integer field ``name`` of ``data``."""
    return _integer(_field(data, name), name)


def boolean(data: Mapping[str, Any], name: str) -> bool:
    """Returns the true-or-false field ``name`` of ``data``."""
    value = _field(data, name)
    if not isinstance(value, bool):
        raise _unexpected(name, "true or false", value)
    return value


def integers(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Returns the field ``name`` of ``data``, a list of integers."""
    return tuple(_integer(item, name) for item in items(data, name))


def integer_lists(data: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], ...]:
    """Returns the field ``name`` of ``data``, a list of lists of integers."""
    return tuple(integers({name: item}, name) for item in items(data, name))


def strings(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Returns the field ``name`` of ``data``, a list of texts."""
    for item in (values := items(data, name)):
        if not isinstance(item, str):
            raise _unexpected(name, "a text", item)
    return tuple(values)


def mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the field ``name`` of ``data``, an object."""
    return _mapping(_field(data, name), name)


def mappings(data: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    """Returns the field ``name`` of ``data``, a list of objects."""
    return tuple(_mapping(item, name) for item in items(data, name))


def items(data: Mapping[str, Any], name: str) -> list[Any] | tuple[Any, ...]:
    """Returns the field ``name`` of ``data``, a list of anything."""
    value = _field(data, name)
    # A tuple is what `dataclasses.asdict` leaves before the value went through JSON.
    if not isinstance(value, (list, tuple)):
        raise _unexpected(name, "a list", value)
    return value


def _field(data: Mapping[str, Any], name: str) -> Any:
    if name not in _mapping(data, "message"):
        raise ProtocolError(f"expected the field {name!r}, found only {sorted(data)}: are all machines of one version?")
    return data[name]


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _unexpected(name, "an object", value)
    return value


def _integer(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _unexpected(name, "an integer", value)
    return value


def _unexpected(name: str, expected: str, value: Any) -> ProtocolError:
    found = f"{value!r:.80}"
    return ProtocolError(f"field {name!r}: expected {expected}, found {found}: are all machines of one version?")
