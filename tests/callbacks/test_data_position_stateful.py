"""Loaders with state of their own: torchdata's, and any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_gemini.callbacks.data_position import exactness_warning, make_resumable
from lightning_gemini.errors import RestoreError
from tests.callbacks.loader_runs import (
    Drawing,
    InFlight,
    interrupted,
    next_numbers,
    resumable_training,
    seed_process,
    undisturbed,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


SAMPLINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sequential": lambda data: {},
    "shuffled": lambda data: {"shuffle": True},
    "shuffled by a generator": lambda data: {"shuffle": True, "generator": generator()},
    "torch's sampler": lambda data: {"sampler": RandomSampler(data)},
    "weighted": lambda data: {"sampler": WeightedRandomSampler([1 + i for i in range(len(data))], 9)},
    "distributed": lambda data: {"sampler": DistributedSampler(data, 2, 1, shuffle=True, seed=3)},
    "distributed with state": lambda data: {"sampler": StatefulDistributedSampler(data, 2, 1, shuffle=True, seed=3)},
}


def maker(sampling: str, workers: int = 0, **kwargs: Any) -> Callable[[], Any]:
    def make() -> Any:
        data = Drawing(10, draws=not workers)
        return StatefulDataLoader(data, batch_size=2, num_workers=workers, **SAMPLINGS[sampling](data), **kwargs)

    return make


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(SAMPLINGS)), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=1))
def test_torchdata_in_one_process(sampling: str, stops: list[tuple[int, int]]) -> None:
    make = maker(sampling)
    # Nobody takes a state before the first iter(), where torchdata makes an iterator only to be asked for its state.
    stops = sorted({(step, 1 if step == 0 else in_flight) for step, in_flight in stops})[:3]
    seen, numbers, loader = interrupted(make, 3, stops)
    assert (seen, numbers) == undisturbed(make, 3)
    assert isinstance(loader, StatefulDataLoader)


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(SAMPLINGS)), st.booleans(), st.integers(0, 8), st.integers(0, 1), st.booleans())
def test_torchdata_with_workers(sampling: str, persistent: bool, step: int, in_flight: int, twice: bool) -> None:
    make = maker(sampling, workers=2, persistent_workers=persistent)
    stops = [(step, in_flight if step else 1), (min(step + 2, 8), 1)][: 1 + twice]
    seen, numbers, _ = interrupted(make, 3, stops)
    assert (seen, numbers) == undisturbed(make, 3)


class Stream(IterableDataset[int]):
    """Numbers in an order drawn for every epoch, of which it keeps state."""

    def __init__(self, length: int) -> None:
        self.length, self.done, self.order = length, 0, list[int]()

    def __iter__(self) -> Iterator[int]:
        if not self.order:
            self.order = torch.randperm(self.length).tolist()
        while self.done < self.length:
            self.done += 1
            yield self.order[self.done - 1]
        self.done, self.order = 0, []

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "order": self.order}  # a live view

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.order = state["done"], state["order"]


def read_ahead(loader: Any, steps: int) -> Iterator[Any]:
    """Reads epochs of unknown length as Lightning does: a batch ahead, to know which one is the last."""
    while steps:
        batches = iter(loader)
        ahead = next(batches)
        while ahead is not None and steps:
            batch, ahead = ahead, next(batches, None)
            loader_in_flight(loader).count = 1 + (ahead is not None)
            yield batch
            loader_in_flight(loader).count -= 1
            steps -= 1


def loader_in_flight(loader: Any) -> Any:
    return loader._gemini_tracker.in_flight


@pytest.mark.parametrize("workers", [0, 1])
def test_torchdata_of_unknown_length(workers: int) -> None:
    def make() -> Any:
        return make_resumable(StatefulDataLoader(Stream(5), batch_size=2, num_workers=workers), InFlight())

    seed_process(1)
    expected = [(batch.tolist(), next_numbers()) for batch in read_ahead(make(), 9)]
    for step in range(9):
        for processed in (False, True):
            seed_process(1)
            loader = make()
            reading = read_ahead(loader, 10)
            for _ in range(step + 1):
                next(reading)
                next_numbers()
            if processed:
                loader_in_flight(loader).count -= 1
            state = loader.state_dict()
            seed_process(2)
            loader = make()
            loader.load_state_dict(state)
            rest = expected[step + processed :]
            assert [(batch.tolist(), next_numbers()) for batch in read_ahead(loader, len(rest))] == rest


class Own:
    """A loader that is no DataLoader, and hands out its live state."""

    def __init__(self) -> None:
        self.state = {"epoch": 0, "done": 0}
        self.sampler = None

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        while self.state["done"] < 4:
            self.state["done"] += 1
            yield torch.tensor([self.state["epoch"], self.state["done"], torch.rand(())])
        self.state.update(epoch=self.state["epoch"] + 1, done=0)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


class Slotted:
    """A loader whose class nobody can swap, and whose state is no dict."""

    __slots__ = ("batches", "done", "sampler")

    def __init__(self) -> None:
        self.done, self.sampler, self.batches = 0, None, 4

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        self.done %= 4
        while self.done < 4:
            self.done += 1
            yield torch.tensor([self.done, torch.rand(())])

    def state_dict(self) -> int:
        return self.done

    def load_state_dict(self, state: int) -> None:
        self.done = state


@pytest.mark.parametrize("make", [Own, Slotted])
@pytest.mark.parametrize("in_flight", [0, 1])
def test_any_loader_with_state(make: Callable[[], Any], in_flight: int) -> None:
    for step in (1, 2, 3, 5, 6):
        seen, numbers, loader = interrupted(make, 2, [(step, in_flight)], sees_end=True)
        assert (seen, numbers) == undisturbed(make, 2, sees_end=True)
        assert exactness_warning(loader) is None
        assert len(loader) == 4


def test_the_proxy_passes_everything_on() -> None:
    loader = Slotted()
    proxy: Any = make_resumable(loader, lambda: 0)
    assert proxy is not loader
    assert make_resumable(proxy, lambda: 0) is proxy
    proxy.done = 3
    assert loader.done == proxy.done == 3
    with pytest.raises(AttributeError):
        _ = proxy.missing


def test_torchdata_understands_our_states_and_we_understand_its() -> None:
    make = maker("shuffled")
    training = resumable_training(make, 0).run_to(2)
    ours = training.loader.state_dict()
    expected = training.fetch().tolist()
    plain = make()
    plain.load_state_dict(ours)
    assert next(iter(plain)).tolist()[0][0] == expected[0][0]
    plain.load_state_dict(ours)
    iter(plain)
    loader: Any = make_resumable(make(), lambda: 0)
    loader.load_state_dict(plain.state_dict())
    assert next(iter(loader)).tolist()[0][0] == expected[0][0]


def test_another_kind_of_loader() -> None:
    state = resumable_training(maker("shuffled"), 0).run_to(1).loader.state_dict()
    loader: Any = make_resumable(DataLoader(Drawing(10), batch_size=2), lambda: 0)
    with pytest.raises(RestoreError, match="of another kind of loader"):
        loader.load_state_dict(state)
