"""Lightning's own checkpoint dictionary, without what the engine keeps; taken every iteration, so at little cost.

Lightning makes the dictionary and calls every hook as for any checkpoint. Only two things differ: the module's
``state_dict`` is made when a hook looks into it, and the loops' progress is read without copying it field by field.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _BaseProgress

from lightning_gemini.callbacks.data_position.resumable_loader import Resumable

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["StateOnDemand", "lightning_state", "loop_states"]

_FROM_THE_ENGINE = "state_dict", "optimizer_states"
_LOOPS = "fit_loop", "validate_loop", "test_loop", "predict_loop"


def lightning_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What Lightning would write to a checkpoint now, without weights and optimizer states.

    Raises:
        Exception: Whatever a user's hook raises.
    """
    strategy, connector = trainer.strategy, trainer._checkpoint_connector
    strategy._snapshotting = True  # type: ignore[attr-defined]
    connector._get_loops_state_dict = lambda: loop_states(trainer)  # type: ignore[method-assign]
    try:
        state: dict[str, Any] = connector.dump_checkpoint(weights_only=False)
    finally:
        del connector._get_loops_state_dict
        strategy._snapshotting = False  # type: ignore[attr-defined]
    return {key: value for key, value in state.items() if key not in _FROM_THE_ENGINE}


def loop_states(trainer: pl.Trainer) -> dict[str, Any]:
    """What every loop has to save, as Lightning has it in checkpoints."""
    found = _found.get(trainer)
    if found is None or not found.holds():
        found = _found[trainer] = _Loops(trainer)
    return found.read()


class _Loops:
    """A trainer's loops, and where Lightning has what they hold; looked through once, and again when that changes.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._owners: list[dict[str, Any]] = []
        self._parts: list[tuple[dict[str, Any], str, Any]] = []
        self._loops: list[tuple[str, str, Any]] = []
        self._progress: list[tuple[str, str, int]] = []
        self._counters: list[dict[str, Any]] = []
        self._nested: list[tuple[int, str, int]] = []
        for name in _LOOPS:
            self._look_through(name, getattr(trainer, name), "")
        self._sizes = list(map(len, self._owners))

    def holds(self) -> bool:
        """Whether they still consist of the same parts."""
        same = all(owner.get(name) is part for owner, name, part in self._parts)
        return same and list(map(len, self._owners)) == self._sizes

    def read(self) -> dict[str, Any]:
        """The state of each."""
        states: dict[str, dict[str, Any]] = {name: {} for name in _LOOPS}
        for name, prefix, loop in self._loops:
            if type(loop).state_dict is not _Loop.state_dict:
                loop.state_dict(states[name], prefix)
            elif type(loop).on_save_checkpoint is _FitLoop.on_save_checkpoint:
                states[name][f"{prefix}state_dict"] = _loader_states(loop)
            else:
                states[name][f"{prefix}state_dict"] = loop.on_save_checkpoint()
        copies = [*map(dict.copy, self._counters)]
        for whole, key, part in self._nested:
            copies[whole][key] = copies[part]
        for name, key, place in self._progress:
            states[name][key] = copies[place]
        return states

    def _look_through(self, name: str, loop: Any, prefix: str) -> None:
        self._loops.append((name, prefix, loop))
        if type(loop).state_dict is not _Loop.state_dict:
            return
        self._owners.append(vars(loop))
        for key, part in vars(loop).items():
            if isinstance(part, _BaseProgress):
                self._progress.append((name, prefix + key, self._count(part)))
            elif isinstance(part, _Loop):
                self._look_through(name, part, f"{prefix}{key}.")
            else:
                continue
            self._parts.append((vars(loop), key, part))

    def _count(self, progress: _BaseProgress) -> int:
        """Notes what a progress holds: numbers, and progress of its parts. Returns its place among the counters."""
        place, values = len(self._counters), vars(progress)
        self._counters.append(values)
        self._owners.append(values)
        for key, part in values.items():
            if isinstance(part, _BaseProgress):
                self._parts.append((values, key, part))
                self._nested.append((place, key, self._count(part)))
        return place


def _loader_states(loop: Any) -> dict[str, Any]:
    """What ``_FitLoop.on_save_checkpoint`` gives; to ask whether an object has methods costs more than to call them."""
    loaders: list[Any] = loop._combined_loader.flattened if loop._combined_loader is not None else []
    stateful: tuple[Any, ...] = Resumable, _Stateful  # in this order
    states = [each.state_dict() for each in loaders if isinstance(each, stateful)]
    return {"combined_loader": states} if states else {}


_found: weakref.WeakKeyDictionary[pl.Trainer, _Loops] = weakref.WeakKeyDictionary()


class StateOnDemand(OrderedDict[str, Any]):
    """A ``state_dict`` that is made when somebody looks into it, which few hooks do.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__()
        self._make: Callable[[], Mapping[str, Any]] | None = make

    def _fill(self) -> None:
        make, self._make = self._make, None
        if make is not None:
            made = make()
            super().update(made)
            vars(self).update(vars(made))  # torch keeps `_metadata` there

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._make is None:
            raise AttributeError(name)
        self._fill()
        return getattr(self, name)

    # What makes another one makes an ordinary one.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict(self).__reduce_ex__(protocol)

    def copy(self) -> Any:
        """A shallow copy."""
        return OrderedDict(self)

    def __or__(self, other: Any) -> Any:
        return OrderedDict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | OrderedDict(self)


def _filled(name: str) -> Any:
    inherited = getattr(OrderedDict, name)

    def method(self: StateOnDemand, *args: Any, **kwargs: Any) -> Any:
        self._fill()
        return inherited(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__"),
    *("__repr__", "__reversed__", "__setitem__", "clear", "get", "items", "keys", "move_to_end", "pop", "popitem"),
    *("setdefault", "update", "values"),
):
    setattr(StateOnDemand, _name, _filled(_name))
