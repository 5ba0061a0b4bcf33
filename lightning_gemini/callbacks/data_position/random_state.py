"""The random state that the order and content of batches depend on: captured in microseconds, restored exactly.

It is that of the process (python ``random``, numpy's global generator, torch's CPU generator) together with the
loader's *sources*: generators which were handed to the loader, its samplers or its data set, and its samplers' epochs.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["RandomSource", "RandomState", "find_random_sources"]

_EPOCH_NAMES = ("epoch", "_epoch")
_MT19937_BYTES = 625 * 4
_LONGEST_CHILD_LIST = 16
_WORDS = struct.Struct("=625I")
_plain_seen: dict[str, tuple[Any, Any]] = {}
_seen: dict[str, tuple[Any, Any]] = {}


@dataclass(frozen=True, slots=True)
class RandomSource:
    """One generator, or one sampler's epoch, found in a loader.

    Attributes:
        path: where it was found, which names it again in another process, e.g. ``"sampler.generator"``.
        owner: the generator; for an epoch the sampler that has it.
        epoch_name: the attribute that holds the epoch; None for a generator.
    """

    path: str
    owner: Any
    epoch_name: str | None = None

    @property
    def set_by_consumer(self) -> bool:
        """Whether it is an epoch that whoever iterates sets before each one, as Lightning does."""
        return self.epoch_name is not None and callable(getattr(self.owner, "set_epoch", None))

    def read(self) -> Any:
        """The state, in an object of its own."""
        if self.epoch_name is not None:
            return getattr(self.owner, self.epoch_name)
        if isinstance(self.owner, torch.Generator):
            return self.owner.get_state()
        if isinstance(self.owner, np.random.RandomState):
            return self.owner.get_state(legacy=False)
        return self.owner.state if isinstance(self.owner, np.random.BitGenerator) else self.owner.getstate()

    def write(self, state: Any) -> None:
        """Puts the generator or the epoch back to what `read` gave."""
        if self.epoch_name is not None:
            self._write_epoch(state)
        elif isinstance(self.owner, torch.Generator | np.random.RandomState):
            self.owner.set_state(state)
        elif isinstance(self.owner, np.random.BitGenerator):
            self.owner.state = state
        else:
            self.owner.setstate(state)

    def _write_epoch(self, epoch: int) -> None:
        if getattr(self.owner, str(self.epoch_name)) == epoch:
            return  # a sampler's set_epoch may do more than assign
        if callable(set_epoch := getattr(self.owner, "set_epoch", None)):
            set_epoch(epoch)
        else:
            setattr(self.owner, str(self.epoch_name), epoch)


@dataclass(frozen=True, slots=True)
class RandomState:
    """All random state at one moment. Nothing in it is shared with a live generator."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: torch.Tensor
    sources: dict[str, Any]
    _plain: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def capture(cls, sources: Sequence[RandomSource] = ()) -> RandomState:
        """Reads the process's generators and `sources`; draws nothing (about 20 µs)."""
        found = {source.path: source.read() for source in sources}
        return cls(_python_state(), _numpy_state(), _torch_state(), found)

    def restore(self, sources: Sequence[RandomSource] = ()) -> None:
        """Puts the process's generators and those of `sources` that this state knows back."""
        self.restore_process()
        self.restore_sources(sources)

    def restore_process(self) -> None:
        """Puts only the process's generators back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)

    def restore_sources(self, sources: Sequence[RandomSource]) -> None:
        """Puts only those of `sources` back that this state knows."""
        for source in sources:
            if source.path in self.sources:
                source.write(self.sources[source.path])

    def same_process_state(self, other: RandomState) -> bool:
        """Whether the process's own generators (sources aside) are in the same state in both."""
        mine, theirs = (_to_plain((state.python, state.numpy, state.torch)) for state in (self, other))
        return bool(mine == theirs)

    def to_plain(self) -> dict[str, Any]:
        """The state in numbers, strings, bytes and dicts of them, fit for any checkpoint format."""
        # That of an epoch's beginning goes into every version of the epoch.
        if not self._plain:
            parts = {"python": self.python, "numpy": self.numpy, "torch": self.torch, "sources": self.sources}
            self._plain.update({name: _remembered(name, part) for name, part in parts.items()})
        return dict(self._plain)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> RandomState:
        """The inverse of `to_plain`."""
        return cls(**{name: _from_plain(plain[name]) for name in ("python", "numpy", "torch", "sources")})


def find_random_sources(loader: object) -> tuple[RandomSource, ...]:
    """Finds the generators and epochs in a loader's ``generator``, samplers and data set, and in what they nest."""
    found: list[RandomSource] = []
    seen: set[int] = set()
    for name in ("generator", "sampler", "batch_sampler", "dataset"):
        found.extend(_walk(name, getattr(loader, name, None), seen))
    return tuple(found)


def _walk(path: str, value: Any, seen: set[int]) -> Iterator[RandomSource]:
    name = path.rpartition(".")[2]
    if id(value) in seen or value is None:
        return
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, torch.Generator | np.random.RandomState | np.random.BitGenerator) or _is_python_random(value):
        seen.add(id(value))
        yield RandomSource(path, value)
    elif isinstance(value, Sampler | Dataset) or "sampler" in name:
        seen.add(id(value))
        attributes = getattr(value, "__dict__", {})
        if not isinstance(value, Dataset):
            yield from (RandomSource(f"{path}.{n}", value, n) for n in _EPOCH_NAMES if type(attributes.get(n)) is int)
        for child_name, child in attributes.items():
            yield from _walk(f"{path}.{child_name}", child, seen)
    elif isinstance(value, list | tuple) and len(value) <= _LONGEST_CHILD_LIST:
        for index, child in enumerate(value):
            yield from _walk(f"{path}.{index}", child, seen)


def _is_python_random(value: object) -> bool:
    return isinstance(value, random.Random) and not isinstance(value, random.SystemRandom)


def _remembered(name: str, part: Any) -> Any:
    """The plain values of a part; the same objects as the last time, if it is the same part."""
    if (seen := _plain_seen.get(name)) is None or seen[0] is not part:
        seen = _plain_seen[name] = part, _to_plain(part)
    return seen[1]


def _unless_same(name: str, mark: Any, read: Callable[[], Any]) -> Any:
    """What `read` gives; the same object as the last time if `mark` is equal, so that it is made plain once."""
    if (seen := _seen.get(name)) is None or seen[0] != mark:
        seen = _seen[name] = mark, read()
    return seen[1]


def _python_state() -> tuple[Any, ...]:
    if not _MEMORY_TELLS:
        return random.getstate()
    gauss = random._inst.gauss_next  # type: ignore[attr-defined]
    state: tuple[Any, ...] = _unless_same("python", (_python_memory(), gauss), random.getstate)
    return state


def _python_memory() -> bytes:
    """The Mersenne Twister of `random` as CPython has it, behind what all objects begin with."""
    return ctypes.string_at(id(random._inst) + object.__basicsize__, _MT19937_BYTES)


def _memory_tells() -> bool:
    """Whether this Python keeps its Mersenne Twister where `_python_memory` looks: the position, then the words."""
    least_bytes = object.__basicsize__ + _MT19937_BYTES
    if sys.implementation.name != "cpython" or type(random._inst).__basicsize__ < least_bytes:
        return False
    *words, position = random.getstate()[1]
    return _python_memory() == _WORDS.pack(position, *words)


_MEMORY_TELLS = _memory_tells()


def _torch_state() -> torch.Tensor:
    state = torch.get_rng_state()
    same: torch.Tensor = _unless_same("torch", ctypes.string_at(state.data_ptr(), state.nbytes), lambda: state)
    return same


def _numpy_state() -> dict[str, Any]:
    # numpy takes 70 µs to hand out its state. It rarely moves between two batches, and one look at its memory tells.
    # A cached gaussian can be used up without a trace in that memory, so with one the state is always read.
    bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(bits) is not np.random.MT19937:
        return np.random.get_state(legacy=False)
    if (seen := _seen.get("numpy")) is not None and seen[1]["has_gauss"]:
        del _seen["numpy"]
    memory = ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES)
    state: dict[str, Any] = _unless_same("numpy", (bits, memory), lambda: np.random.get_state(legacy=False))
    return state


def _to_plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": value.numpy().tobytes()}
    if isinstance(value, np.ndarray):
        return {"array": value.tobytes(), "dtype": value.dtype.str}
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        if len(value) == 625:  # the Mersenne Twister of `random`
            return {"words": _WORDS.pack(*value)}
        return {"tuple": [_to_plain(item) for item in value]}
    return value.item() if isinstance(value, np.generic) else value


def _from_plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.from_numpy(np.frombuffer(bytearray(value["tensor"]), dtype=np.uint8))
    if "array" in value:
        return np.frombuffer(value["array"], dtype=value["dtype"]).copy()
    if "words" in value:
        return _WORDS.unpack(value["words"])
    if "tuple" in value:
        return tuple(_from_plain(item) for item in value["tuple"])
    return {key: _from_plain(item) for key, item in value.items()}
