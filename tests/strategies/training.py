"""A user's training script: a small model with every option that a test asks for.

``python training.py OPTIONS.json``: the file's fields are those of :class:`Options`. Each rank appends what it saw to
``<out>/rank<R>.jsonl``, one line an event, and the last one describes every bit of the state that training ended with.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_gemini
from lightning_gemini.callbacks import persistent_tier

FEATURES, CLASSES, BATCH = 6, 4, 4


@dataclass
class Options:
    """What one run does.

    Attributes:
        out: Directory of the records; also the Trainer's ``default_root_dir``.
        strategy: Name of a registered strategy, or arguments of ``GeminiStrategy``.
        trainer: More arguments of the Trainer.
        body: Layers of the model, by name.
        width: Size of the hidden layer.
        frozen: Freezes the first layer.
        scheduler: ``cosine`` (a step), ``cosine-epoch``, ``plateau`` (an epoch), or nothing.
        loader: ``shuffled``, ``workers``, ``stateful``, ``stateful-workers``,
            ``stateful-wrapped`` or ``iterable``.
        batches: Training batches an epoch and rank.
        val_batches: Validation batches; 0: no validation.
        callbacks: ``checkpoint``, ``early-stopping``, ``save-meanwhile``, by name.
        ckpt_path: Handed to ``trainer.fit``.
        after: Trainer functions to call after the fit: ``validate``, ``test``, ``fit`` (a second model).
        stop: Where to wait for SIGKILL: hook, and optimizer step, epoch, batch or number of the fit.
        fail: Where to raise an exception.
        pace_s: Sleep in every training step.
        weights: Records the full weights after every step.
        clock_ahead_s: As much later it is than the clock says, for the interval of persistent checkpoints.
    """

    out: str
    strategy: str | dict[str, Any] = "gemini"
    trainer: dict[str, Any] = field(default_factory=dict)
    body: tuple[str, ...] = ("dropout",)
    width: int = 8
    frozen: bool = False
    scheduler: str | None = None
    loader: str = "shuffled"
    batches: int = 5
    val_batches: int = 0
    callbacks: tuple[str, ...] = ()
    ckpt_path: str | None = None
    after: tuple[str, ...] = ()
    stop: dict[str, Any] | None = None
    fail: dict[str, Any] | None = None
    pace_s: float = 0.0
    weights: bool = False
    clock_ahead_s: float = 0.0


class Samples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples (index, features, label); the same ones in every process."""

    def __init__(self, length: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.features = torch.randn(length, FEATURES, generator=draw)
        self.labels = torch.randint(CLASSES, (length,), generator=draw)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(index), self.features[index], self.labels[index]


class Batches:
    """Batches from somewhere: no loader that anybody knows."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def body(names: tuple[str, ...], width: int) -> nn.Sequential:
    kinds: dict[str, Any] = {
        "dropout": lambda: nn.Dropout(0.3),
        "batchnorm": lambda: nn.BatchNorm1d(width),
        "layernorm": lambda: nn.LayerNorm(width),
    }
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), *(kinds[name]() for name in names))


class Classifier(pl.LightningModule):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.model = nn.Sequential(body(options.body, options.width), nn.Linear(options.width, CLASSES))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.seen_on_save = 0
        if options.frozen:
            self.model[0][0].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, features, labels = batch
        self.batches_seen += 1
        noise = random.random() + float(np.random.standard_normal()) + float(torch.rand(1))
        loss = nn.functional.cross_entropy(self.model(features).float(), labels) * (1 + 0.01 * noise)
        self.log("loss", loss)
        time.sleep(self.options.pace_s)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, features, labels = batch
        loss = nn.functional.cross_entropy(self.model(features).float(), labels)
        self.log("val_loss", loss, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
        kind = self.options.scheduler
        if kind is None:
            return optimizer
        if kind == "plateau":
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
        interval = "epoch" if kind == "cosine-epoch" else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"seen": int(self.batches_seen), "names": ["a", "b"]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen_on_save = checkpoint["mine"]["seen"]

    def loader(self, batches: int, shuffle: bool) -> Any:
        data = Samples(batches * BATCH * self.trainer.world_size, seed=int(shuffle))
        kind = self.options.loader
        if kind == "iterable" and shuffle:
            return Batches(list(DataLoader(Samples(batches * BATCH), BATCH)))
        if kind.startswith("stateful") and shuffle:
            return self.stateful_loader(data, kind)
        return DataLoader(data, BATCH, shuffle=shuffle, num_workers=2 if kind == "workers" and shuffle else 0)

    def stateful_loader(self, data: Samples, kind: str) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        if kind == "stateful-wrapped":  # Lightning wraps the sampler that the loader makes for itself
            return StatefulDataLoader(data, batch_size=BATCH, shuffle=True)
        sampler = StatefulDistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, seed=7)
        return StatefulDataLoader(data, batch_size=BATCH, sampler=sampler, num_workers=2 if kind.endswith("s") else 0)

    def train_dataloader(self) -> Any:
        return self.loader(self.options.batches, shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader(self.options.val_batches, shuffle=False) if self.options.val_batches else []

    def test_dataloader(self) -> Any:
        return self.loader(2, shuffle=False)


class Counter(Callback):
    """A user's callback with state, as Lightning keeps it in checkpoints."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.epochs = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.epochs = list(state_dict["losses"]), state_dict["epochs"]


class Recorder(Callback):
    """Writes down what happens; has no state of its own."""

    def __init__(self, out: Path, weights: bool = False) -> None:
        self.path = out / f"rank{os.environ['RANK']}.jsonl"
        self.weights = weights

    def write(self, kind: str, **fields: Any) -> None:
        with self.path.open("a") as lines:
            lines.write(json.dumps({"kind": kind, **fields}) + "\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = trainer.strategy.job_state  # type: ignore[attr-defined]
        found = state.found if state is not None else None
        fields = {"version": found.version, "tier": found.tier.value} if found else {"version": None, "tier": None}
        self.write("start", step=steps(trainer), seen_on_save=pl_module.seen_on_save, **fields)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        if self.weights:
            self.write("weights", step=steps(trainer), weights=full_weights(pl_module))
        loss, metric = float(outputs["loss"]), float(trainer.callback_metrics["loss"])
        about = {"epoch": trainer.current_epoch, "batch": batch_idx, "step": steps(trainer)}
        about["global_step"] = trainer.global_step
        self.write("train", **about, loss=loss, metric=metric, rates=rates, samples=batch[0].tolist())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            batch = trainer.fit_loop.epoch_loop.batch_progress.current.completed
            about = {"epoch": trainer.current_epoch, "batch": batch, "step": steps(trainer)}
            self.write("val", **about, val_loss=float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.write("end", state=end_state(trainer, pl_module))


def steps(trainer: pl.Trainer) -> int:
    """Optimizer steps that DeepSpeed took; Lightning counts differently where an epoch ends in mid-accumulation."""
    return int(trainer.strategy.deepspeed_engine.global_steps)  # type: ignore[attr-defined]


def end_state(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Every bit that the next step would depend on, tensors by their digest."""
    engine = trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
    hosts = {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
    hosts.pop("ModelCheckpoint", None)  # has paths and times in it
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    loops = trainer.fit_loop.epoch_loop
    everything = {
        "optimizer": engine.optimizer.state_dict(),
        "module": dict(module.state_dict()),
        "buffers": dict(module.named_buffers()),
        "callbacks": hosts,
        "schedulers": schedulers,
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "progress": {
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batches": loops.batch_progress.total.completed,
            "epochs": trainer.fit_loop.epoch_progress.current.completed,
            "scheduler": loops.scheduler_progress.total.completed,
            "optimizer": loops.automatic_optimization.optim_progress.optimizer.step.total.completed,
            "engine": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        },
    }
    return flatten(everything)


def full_weights(module: nn.Module) -> dict[str, Any]:
    """Weights and buffers by name, as lists; collective, with ZeRO-3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: value.float().tolist() for name, value in module.state_dict().items()}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {path: f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"}
    if isinstance(value, dict):
        return {key: leaf for name, part in value.items() for key, leaf in flatten(part, f"{path}/{name}").items()}
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor | dict | list | tuple) for part in value):
        return {key: leaf for place, part in enumerate(value) for key, leaf in flatten(part, f"{path}/{place}").items()}
    text = repr(value)
    return {path: text if len(text) < 200 else hashlib.sha256(pickle.dumps(value)).hexdigest()[:16]}


class Trap(Callback):
    """Does something at one place."""

    fit = -1

    def __init__(self, spring: Callable[[], None], hook: str, **where: int) -> None:
        self.spring, self.where = spring, {"fit": 0, **where}
        setattr(self, hook, self._look)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        here = {"step": steps(trainer), "epoch": trainer.current_epoch, "batch": args[-1] if args else None}
        here["fit"] = Trap.fit
        if all(here[name] == value for name, value in self.where.items()):
            self.spring()


def wait_for_sigkill(out: Path) -> None:
    (out / f"stopped{os.environ['RANK']}").touch()
    time.sleep(600)


def fail() -> None:
    raise RuntimeError("the user's callback failed")


class SaveMeanwhile(Callback):
    """Saves a checkpoint where a version of the same state is being read, for which DeepSpeed is made to take long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.strategy.deepspeed_engine.optimizer  # type: ignore[attr-defined]
        lend = optimizer._set_fp32_optimizer_param_groups

        def lend_slowly() -> None:
            lend()
            time.sleep(0.1)

        optimizer._set_fp32_optimizer_param_groups = lend_slowly

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        trainer.save_checkpoint(self.folder / f"step={steps(trainer)}.ckpt")


def callbacks(options: Options) -> list[Callback]:
    out = Path(options.out)
    found: list[Callback] = [Counter(), Recorder(out, options.weights)]
    if "early-stopping" in options.callbacks:
        found.append(EarlyStopping("val_loss", patience=1, min_delta=10.0))
    if "checkpoint" in options.callbacks:
        found.append(ModelCheckpoint(out / "checkpoints", save_top_k=-1, every_n_train_steps=3, save_last=True))
    if "save-meanwhile" in options.callbacks:
        found.append(SaveMeanwhile(out / "checkpoints"))
    if options.stop is not None:
        found.append(Trap(lambda: wait_for_sigkill(out), **options.stop))
    if options.fail is not None:
        found.append(Trap(fail, **options.fail))
    Trap.fit += 1
    return found


def strategy_of(options: Options) -> Any:
    given = options.strategy
    return lightning_gemini.GeminiStrategy(**given) if isinstance(given, dict) else given


def main() -> None:
    fields = json.loads(Path(sys.argv[1]).read_text())
    options = Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    persistent_tier.time = SimpleNamespace(  # type: ignore[assignment]
        **{**vars(time), "time": lambda: time.time() + options.clock_ahead_s}
    )
    pl.seed_everything(7)
    device = os.environ.get("LIGHTNING_GEMINI_TEST_DEVICE", "cpu")
    settings = {"max_epochs": 3, "accelerator": device, "devices": int(os.environ["LOCAL_WORLD_SIZE"])}
    settings |= {"num_nodes": int(os.environ["GROUP_WORLD_SIZE"]), "logger": False, "enable_progress_bar": False}
    settings |= {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 1}
    settings |= {"num_sanity_val_steps": 0, "default_root_dir": options.out, **options.trainer}
    if "checkpoint" in options.callbacks:
        settings["enable_checkpointing"] = True
    trainer = pl.Trainer(strategy=strategy_of(options), callbacks=callbacks(options), **settings)
    model = Classifier(options)
    trainer.fit(model, ckpt_path=options.ckpt_path)
    for function in options.after:
        if function == "fit":
            torch.manual_seed(11)
            trainer = pl.Trainer(strategy=strategy_of(options), callbacks=callbacks(options), **settings)
            trainer.fit(Classifier(options))
        else:
            (metrics,) = getattr(trainer, function)(model, verbose=False)
            Recorder(Path(options.out)).write(function, **metrics)


if __name__ == "__main__":
    main()
