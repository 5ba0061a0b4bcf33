"""A consumer of loaders that can stop anywhere, and data whose every batch tells which random numbers it saw."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, Sampler

from lightning_gemini.callbacks.data_position import make_resumable


class Drawing(Dataset[torch.Tensor]):
    """Samples [index, one number of each global generator]; `loaded` counts the loads in this process."""

    def __init__(self, length: int, draws: bool = True) -> None:
        self.length, self.draws, self.loaded = length, draws, 0
        self.own = np.random.default_rng(5)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded += 1
        if not self.draws:
            return torch.tensor([float(index)])
        numbers = [random.random(), np.random.standard_normal(), float(torch.rand(1)), self.own.random()]
        return torch.tensor([float(index), *numbers], dtype=torch.float64)


class EagerSampler(Sampler[int]):
    """Draws its order in ``__iter__`` itself, and another one for every epoch that it counts."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = (torch.randperm(self.length) + self.epoch) % self.length
        return iter(order.tolist())


class OwnRandomSampler(Sampler[int]):
    """Draws index by index from a generator that lives as long as the sampler."""

    def __init__(self, length: int) -> None:
        self.length, self.own = length, random.Random(3)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            yield self.own.randrange(self.length)


class Plain:
    """A batch sampler that is no Sampler."""

    def __init__(self, sampler: Sampler[int], batch_size: int) -> None:
        self.batches = BatchSampler(sampler, batch_size, False)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def seed_process(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def next_numbers() -> tuple[Any, ...]:
    """Draws from all three generators: equal numbers mean equal streams."""
    return random.random(), np.random.standard_normal(), float(torch.rand(1))


class InFlight:
    """Counts batches fetched and not trained on. It knows no loader: a cycle would keep a loader's workers alive."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        return self.count


class Training:
    """Reads a loader as Lightning does: an iterator an epoch, and no look for an end that it knows.

    Attributes:
        step: batches trained on, in all epochs.
        seen: what was delivered, with what training drew from the random streams behind it.
        sees_end: lets every iterator report its end, as a for loop does.
    """

    def __init__(self, loader: Any, step: int = 0, sees_end: bool = False) -> None:
        self.loader, self.step, self.sees_end = loader, step, sees_end
        self.seen: list[Any] = []
        self.in_flight = InFlight()
        self.batches: Iterator[Any] | None = None
        self.length = len(loader)

    def resume(self, state: Any, at_end: bool = False) -> None:
        """Goes on in another process: the loader's iterator comes first, then all kinds of things, then the epoch."""
        self.loader.load_state_dict(state)
        self.batches = iter(self.loader)
        next_numbers()
        self._set_epoch()
        if at_end:
            assert next(self.batches, None) is None
            self.batches = None

    def fetch(self) -> Any:
        if self.batches is None:
            if self.step:
                self._set_epoch()
            self.batches = iter(self.loader)
            self._set_epoch()
        batch = next(self.batches)
        self.in_flight.count += 1
        return batch

    def train(self, batch: Any) -> None:
        self.seen.append((batch.tolist(), next_numbers()))
        self.in_flight.count -= 1
        self.step += 1
        if self.step % self.length == 0:
            if self.sees_end:
                assert self.batches is not None
                assert next(self.batches, None) is None
            self.batches = None

    def run_to(self, step: int) -> Training:
        while self.step < step:
            self.train(self.fetch())
        return self

    def _set_epoch(self) -> None:
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(self.step // self.length)


def undisturbed(make: Callable[[], Any], epochs: int, sees_end: bool = False) -> tuple[list[Any], tuple[Any, ...]]:
    """What the loader delivers when nobody makes it resumable, and the random numbers that come after."""
    seed_process(1)
    training = Training(make(), sees_end=sees_end)
    training.run_to(epochs * training.length)
    return training.seen, next_numbers()


def interrupted(
    make: Callable[[], Any],
    epochs: int,
    stops: Sequence[tuple[int, int]],
    sees_end: bool = False,
    make_again: Callable[[], Any] | None = None,
) -> tuple[list[Any], tuple[Any, ...], Any]:
    """The same with interruptions, each ``(step, batches in flight)``; also returns the last loader.

    After each, everything is made anew, and the random state is nobody's.
    """
    seed_process(1)
    seen: list[Any] = []
    training = resumable_training(make, 0, sees_end)
    for number, (step, in_flight) in enumerate(stops):
        training.run_to(step)
        for _ in range(in_flight):
            training.fetch()
        state = pickle.loads(pickle.dumps(training.loader.state_dict()))
        seen += training.seen
        seed_process(100 + number)
        at_end = sees_end and step > 0 and step % training.length == 0 and not in_flight
        training = resumable_training(make_again or make, step, sees_end)
        training.resume(state, at_end)
    training.run_to(epochs * training.length)
    return seen + training.seen, next_numbers(), training.loader


def resumable_training(make: Callable[[], Any], step: int, sees_end: bool = False) -> Training:
    training = Training(make(), step, sees_end)
    training.loader = make_resumable(training.loader, training.in_flight)
    return training
