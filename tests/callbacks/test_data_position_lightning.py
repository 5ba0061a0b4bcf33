"""Lightning itself resumes in mid-epoch with loaders that were made resumable."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_gemini.callbacks.data_position import batches_in_flight, epoch_state, make_resumable
from tests.callbacks.loader_runs import Drawing, seed_process
from tests.callbacks.test_data_position_stateful import Stream

warnings.filterwarnings("ignore", module="lightning")


class ResumingStrategy(SingleDeviceStrategy):
    """Makes training loaders resumable."""

    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if not trainer.training:
            return dataloader
        return make_resumable(dataloader, lambda: batches_in_flight(trainer), lambda: epoch_state(trainer))


class Model(pl.LightningModule):
    """Draws in training, so that its weights tell whether all random numbers were the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        parts = batch if isinstance(batch, list) else [batch]
        self.seen.append([part.flatten().tolist() for part in parts])
        return sum(self.layers(part.float().reshape(-1, 1)).sum() for part in parts)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.1)


class ValidatedModel(Model):
    def val_dataloader(self) -> Any:
        return DataLoader(Drawing(2, draws=False))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layers(batch)


class SaveAt(pl.Callback):
    """Saves in one hook of one step, and may then end the run as a crash would."""

    def __init__(self, path: Path, hook: str, step: int) -> None:
        self.path, self.hook, self.step = path, hook, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        torch.rand(2)  # as another callback may do
        self.save(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "on_train_epoch_end")

    def save(self, trainer: pl.Trainer, hook: str) -> None:
        if hook == self.hook and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def mixed() -> Any:
    return DataLoader(Drawing(9), batch_size=2, shuffle=True)


def workers() -> Any:
    return DataLoader(Drawing(9, draws=False), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True)


def several() -> Any:
    short = DataLoader(Drawing(4), batch_size=2, sampler=RandomSampler(range(4)))
    return CombinedLoader([short, DataLoader(Drawing(9), batch_size=2, shuffle=True)], "max_size_cycle")


def torchdatas() -> Any:
    return StatefulDataLoader(Drawing(9), batch_size=2, shuffle=True)


def stream() -> Any:
    return StatefulDataLoader(Stream(9), batch_size=2)


def fit(loader: Any, save: SaveAt, checkpoint: Path | None = None, **limits: Any) -> Model:
    model = ValidatedModel() if save.hook == "on_validation_end" else Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=ResumingStrategy(device=torch.device("cpu")),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[save],
        **limits,
    )
    trainer.fit(model, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    return model


def check(make: Callable[[], Any], path: Path, hook: str, step: int, **limits: Any) -> None:
    save = SaveAt(path, hook, step)
    seed_process(1)
    whole = fit(make(), save, **limits)
    seed_process(2)
    resumed = fit(make(), SaveAt(path, hook, -1), path, **limits)
    assert resumed.seen == whole.seen[step:]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.parametrize("make", [mixed, workers, several, torchdatas, stream])
@pytest.mark.parametrize("step", [2, 7, 10])
def test_a_checkpoint_at_the_start_of_a_batch(make: Callable[[], Any], step: int, tmp_path: Path) -> None:
    """As GEMINI takes them: a batch is in flight; steps 5 and 10 are the first of an epoch."""
    check(make, tmp_path / "state.ckpt", "on_train_batch_start", step, max_epochs=3)


@pytest.mark.parametrize("make", [mixed, several, torchdatas, stream])
@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 15}])
def test_a_checkpoint_at_the_end_of_a_batch(make: Callable[[], Any], step: int, limits: Any, tmp_path: Path) -> None:
    """As ModelCheckpoint(every_n_train_steps=...) takes them; step 5 is the last of an epoch."""
    check(make, tmp_path / "state.ckpt", "on_train_batch_end", step, **limits)


@pytest.mark.parametrize("make", [mixed, several, torchdatas, stream])
def test_a_checkpoint_at_the_end_of_an_epoch(make: Callable[[], Any], tmp_path: Path) -> None:
    check(make, tmp_path / "state.ckpt", "on_train_epoch_end", 5, max_steps=15)


@pytest.mark.parametrize("make", [mixed, several, torchdatas, stream])
@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 15}])
def test_a_checkpoint_after_validation(make: Callable[[], Any], limits: Any, tmp_path: Path) -> None:
    """As ModelCheckpoint takes them by default."""
    check(make, tmp_path / "state.ckpt", "on_validation_end", 5, **limits)


def test_an_epoch_cut_short(tmp_path: Path) -> None:
    for step in (2, 3, 4):
        check(mixed, tmp_path / "state.ckpt", "on_train_batch_end", step, max_epochs=3, limit_train_batches=3)
