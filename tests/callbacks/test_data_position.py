"""Ordinary map-style loaders go on exactly where they were."""

from __future__ import annotations

import copy
import pickle
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_gemini.callbacks.data_position import EpochState, exactness_warning, make_resumable
from lightning_gemini.callbacks.data_position.random_state import RandomState
from lightning_gemini.errors import RestoreError
from tests.callbacks.loader_runs import (
    Drawing,
    EagerSampler,
    OwnRandomSampler,
    Plain,
    Training,
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
    "with replacement": lambda data: {"sampler": RandomSampler(data, True, 3 * len(data))},
    "with replacement by a generator": lambda data: {"sampler": RandomSampler(data, True, 50, generator())},
    "several permutations": lambda data: {"sampler": RandomSampler(data, num_samples=2 * len(data) + 1)},
    "weighted": lambda data: {"sampler": WeightedRandomSampler([1 + i for i in range(len(data))], 9)},
    "subset": lambda data: {"sampler": SubsetRandomSampler(range(0, len(data), 2))},
    "distributed": lambda data: {"sampler": DistributedSampler(data, 2, 1, shuffle=True, seed=3)},
    "eager": lambda data: {"sampler": EagerSampler(len(data))},
    "own generator": lambda data: {"sampler": OwnRandomSampler(len(data))},
}


def maker(
    length: int, sampling: str, batch_size: int | None, drop_last: bool = False, **kwargs: Any
) -> Callable[[], Any]:
    draws = kwargs.pop("draws", True)
    loader_class = kwargs.pop("loader_class", DataLoader)

    def make() -> Any:
        data = Drawing(length, draws)
        arguments: dict[str, Any] = {**SAMPLINGS[sampling](data), **kwargs}
        if batch_size is not None:
            arguments["drop_last"] = drop_last
        return loader_class(data, batch_size=batch_size, **arguments)

    return make


@st.composite
def cases(draw: st.DrawFn) -> tuple[Callable[[], Any], int, list[tuple[int, int]], bool]:
    batch_size = draw(st.sampled_from([None, 1, 2, 3, 5]))
    length = draw(st.integers(2 * (batch_size or 1), 13))
    make = maker(length, draw(st.sampled_from(sorted(SAMPLINGS))), batch_size, draw(st.booleans()))
    epochs, per_epoch = draw(st.integers(1, 3)), len(make())
    last = epochs * per_epoch - 1
    stops = draw(st.lists(st.tuples(st.integers(0, last), st.integers(0, 1)), min_size=1, max_size=3))
    return make, epochs, sorted(stops), draw(st.booleans())


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(cases())
def test_a_resumed_run_equals_an_undisturbed_one(case: tuple[Any, ...]) -> None:
    make, epochs, stops, sees_end = case
    seen, numbers, loader = interrupted(make, epochs, stops, sees_end)
    assert (seen, numbers) == undisturbed(make, epochs, sees_end)
    length, done = len(loader), stops[-1][0]
    batch_size = loader.batch_size or 1
    assert loader.dataset.loaded <= (epochs * length - done) * batch_size


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(SAMPLINGS)), st.booleans(), st.integers(0, 11), st.integers(0, 1), st.booleans())
def test_with_workers(sampling: str, persistent: bool, step: int, in_flight: int, twice: bool) -> None:
    make = maker(12, sampling, 2, num_workers=2, persistent_workers=persistent, draws=False)
    epochs = 3 if len(make()) < 6 else 2
    last = epochs * len(make()) - 1
    stops = [(min(step, last), in_flight), (min(step + 2, last), 1)][: 1 + twice]
    seen, numbers, _ = interrupted(make, epochs, stops)
    assert (seen, numbers) == undisturbed(make, epochs)


@pytest.mark.parametrize(
    ("sampling", "before", "after", "stop"),
    [
        ("shuffled", 0, 1, (4, 0)),
        ("shuffled", 0, 1, (6, 1)),
        ("shuffled", 0, 1, (0, 0)),
        ("shuffled", 1, 0, (4, 1)),
        ("shuffled", 1, 0, (6, 1)),
        ("shuffled by a generator", 1, 0, (4, 0)),
        ("distributed", 0, 1, (7, 1)),
    ],
)
def test_the_number_of_workers_may_change(sampling: str, before: int, after: int, stop: tuple[int, int]) -> None:
    first, second = (maker(12, sampling, 2, draws=False, num_workers=workers) for workers in (before, after))
    length = len(first())
    epochs = stop[0] // length + 1
    seen, _, _ = interrupted(first, epochs, [stop], make_again=second)
    assert [batch for batch, _ in seen] == [batch for batch, _ in undisturbed(first, epochs)[0]]


def test_a_fresh_epoch_gives_its_workers_the_same_seed() -> None:
    class Seeds(Dataset[int]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> int:
            return int(torch.randint(2**40, ()))

    def make() -> Any:
        return DataLoader(Seeds(), batch_size=1, shuffle=True, num_workers=1)

    seen, _, _ = interrupted(make, 2, [(6, 1)])
    assert seen == undisturbed(make, 2)[0]


class LazyLoader(DataLoader[Any]):
    """Makes its iterator at the first fetch."""

    def __iter__(self) -> Any:
        random.random()
        yield from super().__iter__()


class WrappingLoader(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return map(torch.clone, super()._get_iterator())


@pytest.mark.parametrize("loader_class", [LazyLoader, WrappingLoader])
@pytest.mark.parametrize("stop", [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1), (7, 1)])
def test_subclasses(loader_class: type, stop: tuple[int, int]) -> None:
    make = maker(8, "shuffled", 2, loader_class=loader_class)
    seen, numbers, loader = interrupted(make, 2, [stop])
    assert (seen, numbers) == undisturbed(make, 2)
    assert isinstance(loader, loader_class)


@pytest.mark.parametrize("stop", [(0, 1), (2, 1)])
def test_a_subclass_that_starts_its_workers_at_the_first_fetch(stop: tuple[int, int]) -> None:
    make = maker(8, "shuffled", 2, loader_class=LazyLoader, num_workers=1, draws=False)
    seen, numbers, _ = interrupted(make, 1, [stop])
    assert (seen, numbers) == undisturbed(make, 1)


def test_a_batch_sampler_of_any_kind() -> None:
    def make() -> Any:
        data = Drawing(9)
        return DataLoader(data, batch_sampler=Plain(EagerSampler(9), 2))  # type: ignore[arg-type]

    for step in range(10):
        for in_flight in (0, 1):
            seen, numbers, _ = interrupted(make, 3, [(step, in_flight)])
            assert (seen, numbers) == undisturbed(make, 3)


def test_lightnings_wrapper_of_a_users_sampler() -> None:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    def make() -> Any:
        data = Drawing(12)
        users = RandomSampler(data, generator=generator())
        return DataLoader(data, batch_size=2, sampler=DistributedSamplerWrapper(users, num_replicas=2, rank=1))

    for step in range(6):
        seen, numbers, _ = interrupted(make, 3, [(step, 1)])
        assert (seen, numbers) == undisturbed(make, 3)


def test_nothing_that_was_seen_is_loaded_again() -> None:
    make = maker(1000, "shuffled", 10)
    training = resumable_training(make, 0).run_to(90)
    again = resumable_training(make, 90)
    again.resume(training.loader.state_dict())
    again.run_to(91)
    assert again.loader.dataset.loaded == 10


def test_the_epoch_after_an_end_that_nobody_asked_for() -> None:
    """Lightning asks for an iterator once more when a run resumes behind the last batch of an epoch."""
    make = maker(8, "shuffled", 2)
    expected, numbers = undisturbed(make, 2)
    seed_process(1)
    training = resumable_training(make, 0).run_to(4)
    state = training.loader.state_dict()
    seed_process(2)
    again = resumable_training(make, 4)
    again.resume(state)
    next_numbers()
    again.batches = None  # fetch() calls iter() once more
    again.run_to(8)
    assert again.seen == expected[4:]
    assert next_numbers() == numbers


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_read_in_turns(mode: Any, in_flight: int, workers: int) -> None:
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    def make(resumable: bool = True) -> Any:
        loaders: list[Any] = [
            DataLoader(Drawing(length, not workers), 1, shuffle=True, num_workers=workers) for length in (3, 7)
        ]
        if resumable:
            loaders = [make_resumable(loader, lambda: in_flight, lambda: EpochState.RUNNING) for loader in loaders]
        return CombinedLoader(loaders, mode)

    def read(batches: Iterator[Any], count: int) -> list[Any]:
        return [(repr(next(batches)[0]), next_numbers()) for _ in range(count)]

    steps = 3 if mode == "min_size" else 7
    seed_process(1)
    expected = [*read(iter(make(resumable=False)), steps), next_numbers()]
    for step in range(2, steps, 1 + workers):
        seed_process(1)
        loader = make()
        batches = iter(loader)
        seen = read(batches, step)
        if in_flight:
            next(batches)
        states = loader._state_dicts()
        seed_process(2)
        loader = make()
        loader._load_state_dicts(states)
        batches = iter(loader)
        next_numbers()
        seen += read(batches, steps - step)
        assert [*seen, next_numbers()] == expected


def test_an_epoch_that_its_consumer_cuts_short() -> None:
    """Lightning's limit_train_batches."""

    def read(loader: Any, epochs: int) -> list[Any]:
        seen: list[Any] = []
        for _ in range(epochs):
            batches = iter(loader)
            seen += [(next(batches).tolist(), next_numbers()) for _ in range(2)]
        return seen

    make = maker(8, "shuffled", 2)
    seed_process(1)
    expected = read(make(), 3)
    seed_process(1)
    loader: Any = make_resumable(make(), lambda: 0, lambda: EpochState.OVER)
    seen = read(loader, 1)
    state = loader.state_dict()
    seed_process(2)
    loader = make_resumable(make(), lambda: 0, lambda: EpochState.OVER)
    loader.load_state_dict(state)
    assert seen + read(loader, 2) == expected


def test_states_before_and_after_loading() -> None:
    make = maker(8, "shuffled", 2)
    expected, numbers = undisturbed(make, 2)
    seed_process(1)
    untouched = resumable_training(make, 0).loader.state_dict()
    training = resumable_training(make, 0).run_to(3)
    state = training.loader.state_dict()
    for loaded, step in ((untouched, 0), (state, 3)):
        seed_process(2)
        passed_on = resumable_training(make, step)
        passed_on.loader.load_state_dict(loaded)
        before_iter = passed_on.loader.state_dict()
        iter(passed_on.loader)
        next_numbers()
        for again in (before_iter, passed_on.loader.state_dict()):
            last = resumable_training(make, step)
            last.resume(again)
            last.run_to(8)
            assert (last.seen, next_numbers()) == (expected[step:], numbers)


def test_more_than_one_batch_in_flight() -> None:
    """A consumer that fetches the next batch before it trains on this one, from beginning to end."""

    def read(loader: Any, first: int, last: int) -> list[Any]:
        batches, seen, ahead = iter(loader), [], list[Any]()
        for step in range(first, last):
            while len(ahead) < min(2, 5 - step):
                ahead.append(next(batches))
            seen.append((ahead.pop(0).tolist(), next_numbers()))
        return seen

    make = maker(10, "shuffled", 2)
    seed_process(1)
    expected = read(make(), 0, 5)
    seed_process(1)
    loader: Any = make_resumable(make(), lambda: 2)
    read(loader, 0, 3)  # batches 2 and 3 are fetched, and 2 is not quite done
    state = loader.state_dict()
    seed_process(2)
    loader = make_resumable(make(), lambda: 2)
    loader.load_state_dict(state)
    assert read(loader, 2, 5) == expected[2:]


def test_another_iterator_in_between_does_not_confuse() -> None:
    make = maker(10, "shuffled", 2)
    training = resumable_training(make, 0).run_to(2)
    list(training.loader)  # a callback looks at all data
    batch = training.fetch()
    state = training.loader.state_dict()
    again = resumable_training(make, 2)
    again.resume(state)
    assert torch.equal(again.fetch(), batch)


def test_a_used_loader_can_be_loaded() -> None:
    for workers in (0, 1):
        make = maker(8, "shuffled", 2, num_workers=workers, persistent_workers=bool(workers), draws=not workers)
        training = resumable_training(make, 0).run_to(5)
        state = training.loader.state_dict()
        rest = training.run_to(8).seen[5:]
        training.step, training.seen = 5, []
        training.resume(state)
        assert training.run_to(8).seen == rest


def test_persistent_workers_that_were_in_use() -> None:
    make = maker(8, "shuffled", 2, num_workers=1, persistent_workers=True, draws=False)
    training = Training(make())
    training.run_to(4)
    training.loader = make_resumable(training.loader, training.in_flight)
    training.run_to(6)
    state = training.loader.state_dict()
    expected = [batch for batch, _ in training.run_to(8).seen[6:]]
    again = resumable_training(make, 6)
    again.resume(state)
    assert [batch for batch, _ in again.run_to(8).seen] == expected


def test_the_loader_stays_itself() -> None:
    loader = DataLoader(Drawing(8), batch_size=2, shuffle=True)
    assert make_resumable(loader, lambda: 0) is loader
    resumable = type(loader)
    assert make_resumable(loader, lambda: 1) is loader
    assert type(loader) is resumable
    assert isinstance(loader, DataLoader)
    assert resumable.__name__ == "ResumableDataLoader"
    assert len(loader) == len(iter(loader)) == 4
    again = type(loader)(Drawing(4), batch_size=2)  # Lightning does so to replace a sampler
    assert len(list(again)) == 2
    for twin in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(twin) is DataLoader
        assert len(list(twin)) == 4


def test_the_state_is_plain(tmp_path: Any) -> None:
    training = resumable_training(maker(8, "shuffled by a generator", 2), 0).run_to(1)
    state = training.loader.state_dict()

    def leaves(value: Any) -> Iterator[Any]:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from leaves(item)
        if not isinstance(value, dict | list):
            yield value

    assert {type(leaf) for leaf in leaves(state)} <= {int, float, bool, str, bytes, type(None)}
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def test_recording_is_cheap() -> None:
    seed_process(0)
    RandomState.capture()
    start = time.perf_counter()
    for _ in range(1000):
        RandomState.capture()
    assert (time.perf_counter() - start) / 1000 < 200e-6  # about 20 µs on an idle machine


def test_a_cached_gaussian_is_noticed() -> None:
    np.random.seed(0)
    np.random.standard_normal()
    with_second = RandomState.capture()
    second = np.random.standard_normal()  # uses up the cache, and moves nothing else
    without = RandomState.capture()
    third = np.random.standard_normal()
    without.restore()
    assert np.random.standard_normal() == third
    with_second.restore()
    assert np.random.standard_normal() == second


def test_states_of_other_loaders_are_refused() -> None:
    loader: Any = make_resumable(DataLoader(Drawing(8), batch_size=2), lambda: 0)
    with pytest.raises(RestoreError, match=r"expected the position of a map-style DataLoader.*_snapshot"):
        loader.load_state_dict({"_snapshot": 1})
    other: Any = make_resumable(DataLoader(Drawing(8), batch_size=4), lambda: 0)
    with pytest.warns(UserWarning, match="had 2 batches per epoch .* has 4 now"):
        loader.load_state_dict(other.state_dict())


class HoardingLoader(DataLoader[Any]):
    """Keeps one iterator for its whole life."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hoarded = super().__iter__()

    def __iter__(self) -> Any:
        return self.hoarded


def test_a_loader_that_keeps_its_iterator_is_reported() -> None:
    make = maker(8, "sequential", 2, loader_class=HoardingLoader)
    training = resumable_training(make, 0).run_to(2)
    again = resumable_training(make, 2)
    again.resume(training.loader.state_dict())
    with pytest.warns(UserWarning, match="the 2 batches of this epoch that had been seen were not skipped"):
        again.fetch()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_loaders_that_cannot_be_resumed_say_so() -> None:
    stream = DataLoader(Stream())
    assert make_resumable(stream, lambda: 0) is stream
    assert type(stream) is DataLoader
    assert "iterable-style data set Stream" in str(exactness_warning(stream))
    plain = range(3)
    assert make_resumable(plain, lambda: 0) is plain
    assert "range has no state_dict" in str(exactness_warning(plain))
    unordered = DataLoader(Drawing(3), num_workers=1, in_order=False)
    assert "Use in_order=True" in str(exactness_warning(unordered))
    assert exactness_warning(make_resumable(DataLoader(Drawing(3), num_workers=1), lambda: 0)) is None


def test_random_state_is_pythons_own_whatever_was_drawn_and_one_object_while_nothing_was() -> None:
    before = random.getstate()
    changes = [
        lambda: random.seed(3),
        random.random,
        lambda: random.gauss(0.0, 1.0),  # leaves a second number for the next call
        lambda: random.gauss(0.0, 1.0),
        lambda: random.setstate(before),
        lambda: [random.random() for _ in range(700)],  # past the end of the twister's words
        lambda: torch.manual_seed(5),
        lambda: torch.rand(3),
        lambda: np.random.seed(7),
        lambda: np.random.standard_normal(),
    ]
    for change in changes:
        change()
        state = RandomState.capture()
        assert state.python == random.getstate()
        assert torch.equal(state.torch, torch.get_rng_state())
        assert repr(state.numpy) == repr(np.random.get_state(legacy=False))
        again = RandomState.capture()
        assert again.python is state.python
        assert again.torch is state.torch
