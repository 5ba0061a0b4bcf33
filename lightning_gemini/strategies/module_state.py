"""A module's ``state_dict()`` for every version, without a walk through the module for every version."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn

from lightning_gemini.errors import StateChangedError

_HOOKS = "_state_dict_hooks", "_state_dict_pre_hooks"
_CONTENTS = itemgetter("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", *_HOOKS)
_NONE = partial(is_, None)
_OVERRIDABLE = "state_dict", "_save_to_state_dict", "get_extra_state"


class ModuleState:
    """Reads the entries of a module's ``state_dict()``.

    What the module consists of is remembered. Whether that still holds is looked at when training goes on already,
    by :meth:`verify`: a version that was taken in between is given up, and the next :meth:`read` looks through the
    module again. A module with a part that makes its state itself is asked for it every time.

    Args:
        module: The module that the engine trains.

    Attributes:
        order: Names of all entries, as ``state_dict()`` had them at the last :meth:`read`.
        parameters: The module's parameters by name, tied ones under each of theirs; another dictionary after a change.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.order: list[str] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self._parts: list[nn.Module] = []
        self._buffers: list[tuple[str, nn.Module, str]] = []
        self._contents: list[Any] = []
        self._named: list[Any] = []
        self._held: list[Any] = []
        self._buffered: list[Any] = []
        self._known: tuple[list[Any], list[int]] | None = None
        self._makes_own = False

    def read(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """The entries by name, live: parameters, and all others: buffers, and what parts of the module made."""
        if self._known is None or any(key not in part._buffers for _, part, key in self._buffers):
            self._look_through()
        if self._makes_own:
            return self._ask()
        return self.parameters, {name: part._buffers[key] for name, part, key in self._buffers}

    def verify(self) -> None:
        """Check that the last :meth:`read` took the module for what it is; may run on another thread.

        Raises:
            StateChangedError: It has another submodule, parameter, name of a buffer or hook since.
        """
        if self._known is None or not _same(self._known, self._composition()):
            self._known = None
            raise StateChangedError(
                "the model has got, or lost, a submodule, parameter, buffer or hook since the version before; "
                "nothing is to be done: the next version has it"
            )

    def _composition(self) -> tuple[list[Any], list[int]]:
        """What decides which entries there are: objects, to be compared by identity, and how many are in which part."""
        # In C throughout: a large model has thousands of parts, most of them with little in them.
        composition: list[Any] = []
        composition.extend(chain.from_iterable(self._named))
        composition.extend(chain.from_iterable(map(dict.values, self._held)))
        composition.extend(map(_NONE, chain.from_iterable(map(dict.values, self._buffered))))
        return composition, list(map(len, self._contents))

    def _look_through(self) -> None:
        module, self._known = self._module, None
        self._parts = list(module.modules())
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self._buffers = [
            (f"{prefix}.{key}" if prefix else key, part, key)
            for prefix, part in module.named_modules(remove_duplicate=False)
            for key, value in part._buffers.items()
            if value is not None and key not in part._non_persistent_buffers_set
        ]
        contents = [*zip(*map(_CONTENTS, map(vars, self._parts)), strict=True)]
        children, parameters, buffers, unsaved, hooks, earlier_hooks = contents
        self._contents = [*chain(*contents)]
        self._named = [*filter(None, chain(children, parameters, buffers, unsaved))]
        self._held = [*filter(None, chain(children, parameters, hooks, earlier_hooks))]
        self._buffered = [*filter(None, buffers)]
        entries = module.state_dict()
        self.order = list(entries)
        expected = self.parameters.keys() | {name for name, _, _ in self._buffers}
        self._makes_own = entries.keys() != expected or any(map(_makes_own, self._parts))
        self._known = self._composition()

    def _ask(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        entries = self._module.state_dict()
        self.order = list(entries)
        parameters = {name: value for name, value in entries.items() if name in self.parameters}
        return parameters, {name: value for name, value in entries.items() if name not in parameters}


def _same(known: tuple[list[Any], list[int]], now: tuple[list[Any], list[int]]) -> bool:
    return known[1] == now[1] and all(map(is_, known[0], now[0]))


def _makes_own(part: nn.Module) -> bool:
    """Whether a part's entries are not simply its parameters and buffers."""
    kind = type(part)
    overridden = any(getattr(kind, name) is not getattr(nn.Module, name) for name in _OVERRIDABLE)
    return overridden or "state_dict" in vars(part) or any(vars(part)[hooks] for hooks in _HOOKS)
