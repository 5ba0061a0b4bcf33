"""The shard codec: any nested state comes back bit by bit, and no tensor is ever pickled."""

from __future__ import annotations

import io
import pickle
import pickletools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.shard import ALIGNMENT, SMALL_BYTES, lay_out, read
from lightning_gemini.errors import IntegrityError, RestoreError, StateChangedError
from tests.dataplane.encoding import encode, round_trip, same

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
LARGE = SMALL_BYTES // 4 + 1  # this many float32 are not cloned at once


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, -1) if tensor.dim() > 1 else tensor


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(0).expand(3, *tensor.shape)


def parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(tensor, requires_grad=tensor.dtype.is_floating_point)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(FLOATS + INTEGERS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(-128, 128, shape, generator=generator)
    tensor = raw > 0 if dtype is torch.bool else raw.to(dtype)
    return draw(st.sampled_from([as_it_is, transposed, strided, expanded, parameter]))(tensor)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
keys = st.integers() | st.text(max_size=5)
states = st.recursive(
    tensors() | plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=50)
@given(stable=states, volatile=states)
def test_any_nested_state_comes_back_bit_by_bit(stable: Any, volatile: Any) -> None:
    layout = lay_out(stable, volatile)
    data = encode(layout)
    found_stable, found_volatile = read(memoryview(data))
    assert same(found_stable, stable)
    assert same(found_volatile, volatile)
    assert_no_tensor_is_pickled(layout.blob)
    assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
    ends = [slot.offset + slot.nbytes for slot in layout.slots]
    assert all(end <= slot.offset for end, slot in zip(ends, layout.slots[1:], strict=False))
    assert not ends or ends[-1] <= layout.blob_offset
    data[:] = bytes(len(data))  # nothing that was read refers to the shard's bytes
    assert same(found_stable, stable)


def assert_no_tensor_is_pickled(blob: bytes) -> None:
    stream = io.BytesIO(blob[8:])
    for _ in ("stable", "volatile"):
        assert not [argument for _, argument, _ in pickletools.genops(stream) if "torch" in str(argument)]
    assert not stream.read()


def test_the_blob_stays_small_whatever_the_tensors() -> None:
    state = {"large": torch.zeros(1_000_000), "medium": torch.zeros(LARGE), "none": torch.zeros(0)}
    layout = lay_out(state, {"random": torch.zeros(50_000)})
    assert len(layout.blob) < 500
    assert layout.total_bytes > 4_204_000


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)], ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    assert same(round_trip([tensor], [tensor]), ([tensor], [tensor]))


def test_what_is_not_a_number_keeps_its_bits() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    assert same(round_trip(odd)[0], odd)


def test_parameters_come_back_as_tensors_without_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    found, _ = round_trip([weight, weight * 2])
    assert [type(tensor) for tensor in found] == [torch.Tensor, torch.Tensor]
    assert not any(tensor.requires_grad for tensor in found)


def test_one_tensor_in_two_places_travels_once_and_stays_one() -> None:
    weight = torch.arange(LARGE, dtype=torch.float32)
    layout = lay_out({"a": weight, "b": [weight, weight.detach()], "c": weight.view(-1, 1)}, weight)
    assert len(layout.slots) == 3  # the two shapes, and the volatile clone
    stable, volatile = read(memoryview(encode(layout)))
    assert stable["a"] is stable["b"][0] is stable["b"][1]
    assert same(stable["c"], weight.view(-1, 1))
    stable["a"].zero_()
    assert same(volatile, weight)


def test_views_of_one_storage_are_told_apart() -> None:
    base = torch.arange(12, dtype=torch.float32)
    views = [base[:6], base[6:], base[::2], base[:6].view(2, 3), base[:3], base[:6].to(torch.bfloat16)]
    views += [base.view(torch.int32)[:6], base.view(3, 4).t(), base.view(4, 3)]
    assert same(round_trip(views)[0], views)


def test_conjugated_and_negated_views_are_told_apart() -> None:
    number = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1)
    state = [number, number.conj(), number.imag, number.conj().imag]
    assert same(round_trip(state)[0], [number, number.conj().resolve_conj(), number.imag, -number.imag])


class Passing:
    """Makes its tensors only while it is pickled, one after the other, each in the memory of the one before."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Callable[[], list[Any]], tuple[()], None, Iterator[torch.Tensor]]:
        return list, (), None, (torch.full((100,), value) for value in self.values)


@pytest.mark.parametrize("place", ["stable", "volatile"])
def test_tensors_that_are_gone_while_others_are_pickled_are_not_mixed_up(place: str) -> None:
    values = [float(value) for value in range(20)]
    state = Passing(values)
    found = round_trip(state)[0] if place == "stable" else round_trip(None, state)[1]
    assert [float(tensor[0]) for tensor in found] == values


# -- when what is read -------------------------------------------------------------------------------------------------


def test_volatile_state_is_that_of_the_call() -> None:
    small, large = torch.zeros(3), torch.zeros(LARGE)
    layout = lay_out(None, {"small": small, "large": large})
    small += 1
    large += 1
    _, volatile = read(memoryview(encode(layout)))
    assert not volatile["small"].any()
    assert not volatile["large"].any()
    assert not any(slot.live for slot in layout.slots)


def test_large_stable_state_is_read_when_it_is_copied() -> None:
    small, large = torch.zeros(3), torch.zeros(LARGE)
    layout = lay_out([small, large], None)
    (slot,) = layout.slots
    assert slot.live
    assert slot.tensor.data_ptr() == large.data_ptr()  # referenced, not copied
    small += 1
    large += 1
    (found_small, found_large), _ = read(memoryview(encode(layout)))
    assert not found_small.any()  # small ones are read at once: no step waits for them
    assert found_large.all()


def test_packed_values_come_back() -> None:
    value = {"names": ["a", "b"] * 100, "shape": torch.Size([2])}
    packed = shard.pack(value)
    assert isinstance(packed, bytes)
    assert shard.unpack(packed) == value
    assert shard.unpack(round_trip(packed)[0]) == value


# -- what is no shard --------------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((IntegrityError, RestoreError)):
        read(memoryview(data))


def test_a_shard_that_was_cut_is_refused() -> None:
    data = encode(lay_out({"weight": torch.ones(100), "names": ["a"] * 10}, {"step": 3}))
    for length in range(len(data)):
        with pytest.raises((IntegrityError, RestoreError)):
            read(memoryview(data)[:length])


def test_a_class_that_the_script_has_no_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("gone_module")
    made = type("Gone", (), {"__module__": "gone_module"})
    module.Gone = made  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "gone_module", module)
    data = encode(lay_out(None, {"callback": made()}))
    monkeypatch.delitem(__import__("sys").modules, "gone_module")
    with pytest.raises(RestoreError, match=r"gone_module.*start the script that wrote it"):
        read(memoryview(data))


def test_what_cannot_be_pickled_says_so_at_once() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        lay_out(None, {"lock": lambda: None})


def test_what_is_mutated_right_after_the_call_is_that_of_the_call() -> None:
    losses, nested = [1.0], {"history": {"names": ["a"]}}
    layout = lay_out({"groups": [{"lr": 0.1}]}, {"losses": losses, "callback": nested})
    losses.append(2.0)
    nested["history"]["names"].append("b")
    _, volatile = read(memoryview(encode(layout)))
    assert volatile == {"losses": [1.0], "callback": {"history": {"names": ["a"]}}}


# -- one shard after the other -----------------------------------------------------------------------------------------


class Training:
    """State that changes between two versions as a run's does, and in ways that it hardly ever does."""

    def __init__(self, draw: st.DataObject) -> None:
        self.draw = draw
        self.tensors = [self.made() for _ in range(draw.draw(st.integers(1, 6), "tensors"))]
        self.steps = 0

    def made(self) -> torch.Tensor:
        size = self.draw.draw(st.sampled_from([0, 1, 3, LARGE, LARGE + 7]), "elements")
        return torch.full((size,), float(self.draw.draw(st.integers(0, 9), "value")))

    def change(self) -> None:
        self.steps += 1
        index = self.draw.draw(st.integers(0, len(self.tensors) - 1), "which")
        tensor = self.tensors[index]
        kind = self.draw.draw(st.sampled_from(["step", "other", "data", "shape", "view", "drop", "more"]), "change")
        if kind == "step":
            for each in self.tensors:
                each.add_(1)
        elif kind == "other":
            self.tensors[index] = self.made()
        elif kind == "data":
            tensor.data = tensor.data.to(torch.float64) + 1
        elif kind == "shape" and tensor.numel():
            tensor.data = tensor.data.reshape(-1)[:1]
        elif kind == "view":
            self.tensors.append(tensor.view(-1))
        elif kind == "drop" and len(self.tensors) > 1:
            del self.tensors[index]
        elif kind == "more":
            self.tensors.insert(index, self.made())


@settings(max_examples=60)
@given(data=st.data())
def test_a_shard_holds_the_same_whatever_the_ones_before_held(data: st.DataObject) -> None:
    planner, training = shard.Planner(), Training(data)
    for _ in range(data.draw(st.integers(2, 6), "versions")):
        cut = data.draw(st.integers(0, len(training.tensors)), "stable tensors")
        stable, volatile = training.tensors[:cut], {"left": training.tensors[cut:], "steps": training.steps}
        layout, alone = planner.draft(partial(list, stable), volatile).finish(), lay_out(stable, volatile)
        assert [slot[1:] for slot in layout.slots] == [slot[1:] for slot in alone.slots]
        assert same(read(memoryview(encode(layout))), (stable, volatile))
        training.change()


def test_volatile_state_is_that_of_the_draft_and_stable_state_is_left_to_whoever_finishes_it() -> None:
    small, large = torch.zeros(3), torch.zeros(LARGE)
    draft = shard.Planner().draft(lambda: [small], [small, large])
    small += 1
    large += 1
    stable, volatile = read(memoryview(encode(draft.finish())))
    assert bool(stable[0].all())
    assert not any(tensor.any() for tensor in volatile)


def test_a_draft_of_another_state_than_it_was_taken_for_is_not_finished() -> None:
    def read_stable() -> None:
        raise StateChangedError("another one")

    with pytest.raises(StateChangedError):
        shard.Planner().draft(read_stable, [2]).finish()
