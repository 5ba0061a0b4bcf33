"""The entries of a module's ``state_dict()`` are read without a walk, and every change of the module is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gemini.errors import StateChangedError
from lightning_gemini.strategies.module_state import ModuleState


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)
        self.register_buffer("later", None)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Part(), Part()
        self.head = nn.Linear(2, 2)
        self.head.weight = self.one.linear.weight  # tied
        self.norm = nn.BatchNorm1d(2)


class Counting(nn.Linear):
    count = 0

    def get_extra_state(self) -> Any:
        Counting.count += 1
        return {"asked": Counting.count}

    def set_extra_state(self, state: Any) -> None: ...


def assert_reads(state: ModuleState, model: nn.Module) -> None:
    parameters, others = state.read()
    expected = model.state_dict()
    found = {**parameters, **others}
    assert state.order == list(expected)
    assert found.keys() == expected.keys()
    assert parameters.keys() == {name for name, _ in model.named_parameters(remove_duplicate=False)} & found.keys()
    for name, value in expected.items():
        assert found[name].data_ptr() == value.data_ptr(), name


def replace_a_buffer(model: Any) -> None:
    model.one.count = model.one.count + 1


def fill_a_buffer(model: Any) -> None:
    model.one.later = torch.ones(3)


def empty_a_buffer(model: Any) -> None:
    model.norm.running_mean = None


def add_a_buffer(model: Any) -> None:
    model.other.linear.register_buffer("new", torch.ones(2))


def save_a_buffer(model: Any) -> None:
    model.one._non_persistent_buffers_set.clear()


def remove_a_buffer(model: Any) -> None:
    del model.one.count


def rename_a_buffer(model: Any) -> None:
    del model.one.later
    model.one.register_buffer("renamed", torch.ones(1))


def replace_a_part(model: Any) -> None:
    model.one.linear = nn.Linear(2, 2)


def rename_a_part(model: Any) -> None:
    part = model.one.linear
    del model.one.linear
    model.one.renamed = part


def move_a_parameter(model: Any) -> None:
    model.other.linear.extra = model.head.bias
    del model.head.bias
    model.head.bias = None


def untie(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.ones(2, 2))


def add_a_part(model: Any) -> None:
    model.norm.inner = Part()


def leave_something_out(model: Any) -> None:
    def leave_out(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        del state["head.bias"]

    model.register_state_dict_post_hook(leave_out)


CHANGES = [
    *(replace_a_buffer, fill_a_buffer, empty_a_buffer, add_a_buffer, save_a_buffer, remove_a_buffer, rename_a_buffer),
    *(replace_a_part, rename_a_part, move_a_parameter, untie, add_a_part, leave_something_out),
]


SEEN_AT_ONCE = replace_a_buffer, remove_a_buffer


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change: Callable[[Any], None]) -> None:
    model = Model()
    state = ModuleState(model)
    assert_reads(state, model)
    state.verify()
    assert_reads(state, model)
    change(model)
    state.read()
    if change not in SEEN_AT_ONCE:
        with pytest.raises(StateChangedError, match="the next version has it"):
            state.verify()
    assert_reads(state, model)
    state.verify()


def test_an_unchanged_module_is_not_walked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    state = ModuleState(model)
    state.read()
    monkeypatch.setattr(Model, "modules", None)
    monkeypatch.setattr(Model, "state_dict", None)
    model.one.count += 1
    assert state.read()[1]["one.count"] == 1
    state.verify()


def test_parts_that_make_their_state_are_asked_every_time() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Counting(2, 2))
    state = ModuleState(model)
    first, second = (state.read()[1]["1._extra_state"]["asked"] for _ in range(2))
    assert second > first
    assert list(state.read()[0]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
