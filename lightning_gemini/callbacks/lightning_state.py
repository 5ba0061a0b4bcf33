"""Lightning's own checkpoint dictionary, without what the engine keeps; taken every iteration, so at little cost.

Lightning makes the dictionary and calls every hook as for any checkpoint. Only two things differ: the module's
``state_dict`` is made when a hook looks into it, and the loops' progress is read without copying it field by field.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _BaseProgress

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
    if found is None or not all(part.holds() for part in found):
        found = _found[trainer] = [part for name in _LOOPS for part in _look_through(name, getattr(trainer, name), "")]
    states: dict[str, Any] = {name: {} for name in _LOOPS}
    for part in found:
        part.read(states[part.name])
    return states


@dataclass(frozen=True, slots=True)
class _LoopPart:
    """A loop, and where Lightning has what it holds.

    Attributes:
        name: Of the outermost loop.
        loop: The loop.
        prefix: Of its entries.
        progress: Its counters by attribute.
        loops: The loops in it, by attribute.
        attributes: How many attributes it has.
    """

    name: str
    loop: Any
    prefix: str
    progress: tuple[tuple[str, _BaseProgress], ...]
    loops: tuple[tuple[str, Any], ...]
    attributes: int

    def holds(self) -> bool:
        """Whether it still consists of the same things."""
        here = vars(self.loop)
        same = all(here.get(name) is part for name, part in (*self.progress, *self.loops))
        return same and len(here) == self.attributes

    def read(self, into: dict[str, Any]) -> None:
        """Adds its entries."""
        if type(self.loop).state_dict is not _Loop.state_dict:
            self.loop.state_dict(into, self.prefix)
            return
        into[f"{self.prefix}state_dict"] = self.loop.on_save_checkpoint()
        for name, progress in self.progress:
            into[self.prefix + name] = _progress(progress)


_found: weakref.WeakKeyDictionary[pl.Trainer, list[_LoopPart]] = weakref.WeakKeyDictionary()


def _look_through(name: str, loop: Any, prefix: str) -> Iterator[_LoopPart]:
    here = vars(loop)
    own = type(loop).state_dict is not _Loop.state_dict
    loops = () if own else tuple((key, value) for key, value in here.items() if isinstance(value, _Loop))
    progress = tuple((key, value) for key, value in here.items() if isinstance(value, _BaseProgress))
    yield _LoopPart(name, loop, prefix, progress, loops, len(here))
    for key, inner in loops:
        yield from _look_through(name, inner, f"{prefix}{key}.")


def _progress(progress: _BaseProgress) -> dict[str, Any]:
    """The counters; a kind of progress that is more than counters reads itself."""
    if type(progress).state_dict is not _BaseProgress.state_dict:
        return progress.state_dict()
    state = dict(vars(progress))
    for name, value in state.items():
        if isinstance(value, _BaseProgress):
            state[name] = _progress(value)
    return state


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

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict(self).__reduce_ex__(protocol)


def _filled(name: str) -> Any:
    inherited = getattr(OrderedDict, name)

    def method(self: StateOnDemand, *args: Any, **kwargs: Any) -> Any:
        self._fill()
        return inherited(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__", "__or__"),
    *("__repr__", "__reversed__", "__ror__", "__setitem__", "clear", "copy", "get", "items", "keys", "move_to_end"),
    *("pop", "popitem", "setdefault", "update", "values"),
):
    setattr(StateOnDemand, _name, _filled(_name))
