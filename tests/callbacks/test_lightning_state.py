"""Lightning's state for a version is what Lightning itself would save, however it was read."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _Progress
from torch.utils.data import DataLoader

from lightning_gemini.callbacks.lightning_state import StateOnDemand, lightning_state, loop_states


class Model(BoringModel):
    """Looks into the checkpoint as users' hooks do."""

    seen: Any = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.seen = sorted(checkpoint["state_dict"])
        del checkpoint["state_dict"]["layer.bias"]


class Comparison(pl.Callback):
    """Compares at every hook that it is called at; counts them."""

    def __init__(self) -> None:
        self.compared = 0

    def compare(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        assert loop_states(trainer) == trainer._checkpoint_connector._get_loops_state_dict()
        self.compared += 1

    on_train_batch_start = on_train_batch_end = on_validation_batch_start = on_train_epoch_end = compare
    on_before_optimizer_step = on_validation_end = compare


class Change(pl.Callback):
    """A user who puts another progress into a loop."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = copy.deepcopy(trainer.fit_loop.epoch_loop.batch_progress)
        trainer.fit_loop.epoch_loop.batch_progress = progress
        trainer.fit_loop.epoch_loop.val_loop.mine = _Progress()  # type: ignore[attr-defined]


def trainer_with(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"limit_train_batches": 3, "limit_val_batches": 2, "max_epochs": 2, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **limits, **quiet)  # type: ignore[arg-type]


def test_loops_are_read_as_lightning_reads_them(tmp_path: Path) -> None:
    comparison = Comparison()
    trainer = trainer_with(tmp_path, comparison, Change())
    trainer.fit(BoringModel())
    assert comparison.compared > 20
    assert loop_states(trainer) == trainer._checkpoint_connector._get_loops_state_dict()


class StatefulLoader(DataLoader[torch.Tensor]):
    """Neither ours nor torchdata's: it has the two methods, no more."""

    def state_dict(self) -> dict[str, Any]:
        return {"place": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class OwnStateLoop(_FitLoop):
    """A user's."""

    def state_dict(self, destination: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
        state = super().state_dict(destination, prefix)
        state["mine"] = 3
        return state


@pytest.mark.parametrize("kind", [_FitLoop, OwnStateLoop])
def test_loaders_with_state_and_loops_with_their_own_are_read_as_lightning_reads_them(
    tmp_path: Path, kind: type[_FitLoop]
) -> None:
    comparison = Comparison()
    trainer = trainer_with(tmp_path, comparison)
    trainer.fit_loop.__class__ = kind
    trainer.fit(BoringModel(), StatefulLoader(RandomDataset(32, 4)))
    assert comparison.compared > 10
    states = loop_states(trainer)["fit_loop"]
    assert states["state_dict"] == {"combined_loader": [{"place": 7}]}
    assert states.get("mine") == (3 if kind is OwnStateLoop else None)


def test_what_was_read_does_not_change_with_the_loops(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    states = loop_states(trainer)
    before = copy.deepcopy(states)
    trainer.fit(BoringModel())
    assert states == before != loop_states(trainer)


def test_hooks_see_the_module_and_nothing_else_changes(tmp_path: Path) -> None:
    trainer, model = trainer_with(tmp_path), Model()
    trainer.fit(model)
    expected = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    state = lightning_state(trainer)
    assert model.seen == ["layer.bias", "layer.weight"]
    assert state.keys() == expected.keys() - {"state_dict", "optimizer_states"}
    assert state["loops"] == expected["loops"]
    assert "_get_loops_state_dict" not in vars(trainer._checkpoint_connector)


def test_a_hook_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(tmp_path)
    trainer.fit(BoringModel())

    def fail(self: Any, checkpoint: dict[str, Any]) -> None:
        raise ValueError("the user's hook failed")

    monkeypatch.setattr(BoringModel, "on_save_checkpoint", fail)
    with pytest.raises(ValueError, match="the user's hook failed"):
        lightning_state(trainer)
    assert "_get_loops_state_dict" not in vars(trainer._checkpoint_connector)
    assert not trainer.strategy._snapshotting  # type: ignore[attr-defined]


USES: dict[str, Callable[[Any], Any]] = {
    "get": lambda state: state.get("weight"),
    "iterate": list,
    "length": len,
    "contains": lambda state: "weight" in state,
    "items": lambda state: [name for name, _ in state.items()],
    "pop": lambda state: (state.pop("weight"), list(state)),
    "update": lambda state: (state.update(new=1), list(state))[1],
    "dict": lambda state: list(dict(state)),
    "unpack": lambda state: list({**state}),
    "or": lambda state: list(state | {"new": 1}),
    "or from the right": lambda state: list({"new": 1} | state),
    "shallow copy": lambda state: list(state.copy()),
    "reversed": lambda state: list(reversed(state)),
    "copy": lambda state: list(copy.deepcopy(state)),
    "pickle": lambda state: list(pickle.loads(pickle.dumps(state))),
    "metadata": lambda state: state._metadata[""],
    "move": lambda state: (state.move_to_end("weight"), list(state))[1],
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_state_on_demand_is_there_whatever_is_done_first(use: Callable[[Any], Any]) -> None:
    module = torch.nn.Linear(2, 3)
    made: list[int] = []

    def make() -> OrderedDict[str, Any]:
        made.append(1)
        return module.state_dict()  # type: ignore[return-value]

    state = StateOnDemand(make)
    assert not made
    found, expected = use(state), use(module.state_dict())
    assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else str(found) == str(expected)
    assert isinstance(state, OrderedDict)
    list(state)
    assert made == [1]
