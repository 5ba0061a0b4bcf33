"""Operators by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lightning_gemini.controlplane.operators.base import JobAccess, Operator
from lightning_gemini.errors import ConfigurationError

ON_THIS_HOST = ("local", "command")
"""Those whose machines are processes that this one starts."""

_CLASSES = {
    "local": "LocalOperator",
    "command": "CommandOperator",
    "slurm": "SlurmOperator",
    "kubernetes": "KubernetesOperator",
    "aws": "AwsOperator",
}


def make_operator(name: str, settings: Mapping[str, Any], access: JobAccess, **local: Any) -> Operator:
    """Makes the operator of a name; what it needs is imported only now.

    Args:
        name: ``local``, ``command``, ``slurm``, ``kubernetes`` or ``aws``.
        settings: Its own, as in ``conf/gemini/operator/<name>.yaml``.
        access: The job.
        **local: For those whose machines are processes of this host: what their constructors take besides.

    Raises:
        ConfigurationError: If there is none of that name, its settings are impossible, or something it needs is not
            installed.
    """
    if name not in _CLASSES:
        raise ConfigurationError(f"operator must be one of {', '.join(_CLASSES)}, got {name!r}")
    try:
        module = importlib.import_module(f"lightning_gemini.controlplane.operators.{name}")
    except ImportError as error:
        raise ConfigurationError(f"operator {name} cannot be used here ({error}): install what it needs") from error
    make = getattr(module, _CLASSES[name])
    if name == "local":
        return make(access, **local)  # type: ignore[no-any-return]
    return make(settings, access, **(local if name in ON_THIS_HOST else {}))  # type: ignore[no-any-return]
