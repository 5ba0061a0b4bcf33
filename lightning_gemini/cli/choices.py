"""Choices on the command line, ``NAME[,key=value…]``: a file of a ``conf/gemini`` group, and what overrides it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gemini.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""


def known_choices(group: str) -> list[str]:
    """Returns the names that a group (``failure``, ``operator``) offers."""
    return sorted(path.stem for path in _folder(group).glob("*.yaml"))


def load_choice(group: str, text: str) -> tuple[str, dict[str, Any]]:
    """Reads a choice and its settings.

    Args:
        group: Group below ``conf/gemini``, such as ``operator``.
        text: ``NAME[,key=value…]``. Values are YAML, as on Hydra's command line; a comma inside brackets, braces or
            quotes belongs to the value; ``a.b=1`` sets a key of a section.

    Returns:
        The name, and the file's settings with the overrides in place.

    Raises:
        ConfigurationError: The name or a key is unknown, or a value is not of the kind that the file has there.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name, *overrides = _split(text)
    if name not in known_choices(group):
        raise ConfigurationError(f"{group} must be one of {', '.join(known_choices(group))}, got {name!r}")
    where = f"{group} {name}"
    try:
        defaults = OmegaConf.load(_folder(group) / f"{name}.yaml")
        given = _parsed(where, overrides)
        settings = OmegaConf.to_container(OmegaConf.merge(defaults, given), resolve=True)
        chosen = OmegaConf.to_container(given)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{where}: {error}") from error
    known, changed = OmegaConf.to_container(defaults), chosen
    assert isinstance(settings, dict)
    assert isinstance(known, dict)
    assert isinstance(changed, dict)
    for key, value in changed.items():
        _check(where, known, str(key), value)
    return name, {str(key): value for key, value in settings.items()}


def _folder(group: str) -> Path:
    """``conf/gemini/<group>``, installed as part of `lightning_gemini.conf`, or beside the package in a checkout."""
    beside = Path(__file__).resolve().parents[2] / "conf"
    if not (beside / "gemini").is_dir():
        beside = Path(str(importlib.import_module("lightning_gemini.conf").__file__)).parent
    return beside / "gemini" / group


def _parsed(where: str, overrides: list[str]) -> DictConfig:
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    if bad := [override for override in overrides if not override.partition("=")[0].strip() or "=" not in override]:
        raise ConfigurationError(f"{where}: expected key=value after the name, found {bad[0]!r}")
    try:
        return OmegaConf.from_dotlist(overrides)
    except YAMLError as error:
        raise ConfigurationError(f"{where}: {', '.join(overrides)}: a value is no YAML ({error})") from error


def _check(where: str, known: Mapping[Any, Any], key: str, value: Any) -> None:
    if key not in known:
        settings = ", ".join(map(str, known)) or "none"
        raise ConfigurationError(f"{where} has no setting {key!r}; it has: {settings}")
    expected = _kind(known[key])
    if expected != "nothing" and value is not None and _kind(value) != expected:
        if expected == "a text" and _kind(value) == "a number":
            return
        raise ConfigurationError(f"{where}: {key} must be {expected}, got {value!r}")


def _kind(value: Any) -> str:
    """What a setting is, in words; `None` in a file leaves it open."""
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "a section of settings"),
    )
    return next((word for kind, word in kinds if isinstance(value, kind)), "nothing")


def _split(text: str) -> list[str]:
    """Splits at the commas outside brackets, braces and quotes."""
    return [part.strip() for part in _parts(text)]


def _parts(text: str) -> Iterator[str]:
    depth, quote, start = 0, "", 0
    for position, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter == "," and depth <= 0:
            yield text[start:position]
            start = position + 1
    yield text[start:]
