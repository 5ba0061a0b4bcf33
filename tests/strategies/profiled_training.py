"""A training script whose collectives are recorded twice: by the profiler, and underneath, where torch is called.

``python profiled_training.py OPTIONS.json``, with ``out`` and ``strategy`` (a ZeRO stage) of ``training.Options``. It
trains three times: as it is, with a larger batch, and with accumulation. Each rank writes a line an iteration.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from deepspeed.comm import comm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gemini
from lightning_gemini.dataplane.collective_tap import CollectiveTap
from lightning_gemini.dataplane.pace_page import PacePage
from lightning_gemini.dataplane.profiler import Profiler

WIDTH, STEPS = 48, 7
RUNS = {"plain": (4, 1), "larger batch": (8, 1), "accumulated": (4, 2)}
"""Batch and accumulation."""

_MOVED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "all_reduce": lambda given: given["tensor"],
    "reduce": lambda given: given["tensor"],
    "broadcast": lambda given: given["tensor"],
    "all_gather": lambda given: given["tensor_list"],
    "all_gather_into_tensor": lambda given: given["output_tensor"],
    "reduce_scatter": lambda given: given["input_list"],
    "reduce_scatter_tensor": lambda given: given["input"],
    "barrier": lambda given: [],
}
_POSITIONS = {"all_reduce": ("tensor",), "reduce_scatter_tensor": ("output", "input")}


class Torch:
    """Counts what torch is asked for, below DeepSpeed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        for name in _MOVED:
            setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))
        # Its back end looked these up when it was made.
        comm.cdb.all_gather_function = torch.distributed.all_gather_into_tensor
        comm.cdb.reduce_scatter_function = torch.distributed.reduce_scatter_tensor

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(_POSITIONS.get(name, ()), args, strict=False)), **kwargs}
            given.setdefault("input", given.get("input_tensor"))
            moved = _MOVED[name](given)
            self.calls.append((name, sum(part.nbytes for part in moved) if isinstance(moved, list) else moved.nbytes))
            return call(*args, **kwargs)

        return counted


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Watch(pl.Callback):
    """Runs the profiler as the strategy does, and writes down what it gives."""

    below: Torch | None = None

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.page = PacePage.private()
        self.profiler = Profiler(self.page, torch.device("cpu"))
        self.tap = CollectiveTap(self.profiler)
        self.step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Watch.below = Watch.below or Torch()
        self.tap.install()
        optimizer = trainer.strategy.deepspeed_engine.optimizer.optimizer  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(lambda *_: self.profiler.step_began())

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.strategy.deepspeed_engine.global_steps  # type: ignore[attr-defined]
        if step != self.step:
            self.step = step
            self.begin_iteration(step)

    def begin_iteration(self, step: int) -> None:
        assert self.below is not None
        found, calls = self.profiler.begin_iteration(step), list(self.below.calls)
        self.below.calls.clear()
        if found is None:
            return
        label, trace = found
        times = [(collective.start_s, collective.end_s) for collective in trace.collectives]
        line = {"kind": "iteration", "run": self.name, "label": label, "shape": trace.shape, "times": times}
        line |= {"began_s": trace.began_s, "ended_s": trace.ended_s, "deadline": trace.deadline}
        line |= {"idle_spans_s": trace.idle_spans_s(), "torch": calls, "last_span": self.last_span}
        with self.path.open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    def on_train_batch_end(self, *_: Any) -> None:
        span = self.page.span()
        self.last_span = [span.index, span.open]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_iteration(-1)
        self.tap.remove()
        self.profiler.close()


def train(name: str, stage: int, out: Path) -> None:
    batch, accumulate = RUNS[name]
    zero = {"stage": stage, "stage3_param_persistence_threshold": WIDTH}  # ZeRO-3 gathers weights, and keeps biases
    zero |= {"reduce_bucket_size": 4 * WIDTH * WIDTH, "overlap_comm": True}
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        strategy=lightning_gemini.GeminiStrategy(
            config={"zero_optimization": zero, "zero_allow_untested_optimizer": True}, checkpoint_every=0
        ),
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        max_steps=STEPS,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        callbacks=[Watch(name, out / f"rank{os.environ['RANK']}.jsonl")],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    rows = 2 * batch * accumulate * STEPS
    data = TensorDataset(torch.randn(rows, WIDTH), torch.randint(4, (rows,)))
    trainer.fit(Net(), DataLoader(data, batch))


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for name in RUNS:
        train(name, options["strategy"]["stage"], Path(options["out"]))


if __name__ == "__main__":
    main()
