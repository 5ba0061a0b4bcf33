"""What ``recipes/experiments/interference.py`` trains, one process a machine: ``interference_training.py SETTINGS``.

A stack of layers under ZeRO-3 and Adam. Where an accelerator would compute, forward and backward of every layer wait
for a set time, so that four machines made on this one do not fight for its processors; collectives, optimizer,
checkpoints and their traffic are real. Parameters are gathered when a layer needs them, not ahead: training waits for
its communication, which therefore shows everything that gets in its way.

Rank 0 writes a line for every iteration to ``iterations.jsonl`` in the run directory, for what it used and left of the
network to ``traces.jsonl``, and for the plan to ``plans.jsonl``; every rank one for every comparison with its replicas
to ``verified/``.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as pl
import torch
from peer_bytes import PeerBytes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from turns import Turn, take_turns

import lightning_gemini

BATCH = 2


class TimedWait(torch.autograd.Function):
    """Stands for the time that an accelerator computes."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradients[0], None, None


class Layer(nn.Module):
    """A square matrix, and its timed wait; the backward pass of a layer takes twice as long as its forward pass."""

    def __init__(self, width: int, wait_s: float) -> None:
        super().__init__()
        self.linear, self.wait_s = nn.Linear(width, width, bias=False), wait_s

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = TimedWait.apply(self.linear(values), self.wait_s, 2 * self.wait_s)
        return result


class Net(pl.LightningModule):
    """Layers of ``width`` × ``width`` parameters that learn to give back what they get."""

    def __init__(self, layers: int, width: int, wait_s: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(width, wait_s) for _ in range(layers)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Alternation(pl.Callback):
    """Once a plan is made, switches the scheme when it is another one's turn, and writes down what iterations take.

    Args:
        turns: One an iteration.
        folder: The run directory.
        patience: Iterations after which a plan must be there.
        verify_all: Compare replicas before every iteration; else once a block, before an iteration that does not count.
    """

    def __init__(self, turns: list[Turn], folder: Path, *, patience: int, verify_all: bool) -> None:
        self.turns, self.patience, self.verify_all = turns, patience, verify_all
        self.record = Record(folder)
        self._index, self._iterations, self._since = -1, 0, 0.0
        self._peers: PeerBytes | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The collector would stop one rank or another for milliseconds at times of its own.
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seconds = time.perf_counter() - self._since
        state: Any = trainer.strategy.job_state  # type: ignore[attr-defined]
        if self._index >= 0:
            self.record.iteration(state, trainer.global_step, self.turns[self._index], seconds)
        self._iterations += 1
        if self._index >= 0 or self._planned(state):
            self._index += 1
            self._begin(trainer, state)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._index >= 1:  # by now the profiler has finished the iteration before
            self.record.trace(trainer.strategy.job_state, self.turns[self._index - 1])  # type: ignore[attr-defined]

    def _planned(self, state: Any) -> bool:
        if state.traffic.plan is None and self._iterations > self.patience:
            raise RuntimeError(f"no plan was made in {self.patience} iterations; see the warnings above")
        return state.traffic.plan is not None

    def _begin(self, trainer: pl.Trainer, state: Any) -> None:
        if self._index == len(self.turns):  # this iteration only ends the one before
            trainer.should_stop = True
            return
        turn = self.turns[self._index]
        if turn.switched:
            gc.collect()
            state.traffic.set_scheme(turn.scheme)
            self.record.plan(state, self._index)
        if self.verify_all or turn.switched:
            self._peers = self._peers or PeerBytes(state)
            self.record.verified(state, self._index, self._peers.compare())


class Record:
    """What one rank writes down: files of JSON lines in the run directory.

    Args:
        folder: The run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trace: Any = None
        (folder / "verified").mkdir(exist_ok=True)

    def iteration(self, state: Any, step: int, turn: Turn, seconds: float) -> None:
        """One iteration is over. ``step`` steps are completed, so that its version was ``step - 1``."""
        line = {"version": step - 1, "scheme": turn.scheme, "round": turn.round, "counted": turn.counted}
        self._append(state, "iterations.jsonl", {**line, "seconds": seconds})

    def trace(self, state: Any, turn: Turn) -> None:
        """What training used and left of the network in the iteration before."""
        trace = state.traffic.last_trace
        if trace is None or trace is self._trace or not turn.counted:
            return
        self._trace = trace
        idle_s = sum(trace.idle_spans_s())
        line = {"scheme": turn.scheme, "idle_s": idle_s, "busy_s": trace.ended_s - trace.began_s - idle_s}
        self._append(state, "traces.jsonl", line)

    def plan(self, state: Any, index: int) -> None:
        """The plan in force."""
        plan = state.traffic.plan
        if plan is None:
            return
        line = {
            "index": index,
            "every": plan.cadence.every,
            "overrun_s": plan.cadence.schedule.overrun_s,
            "idle_s": plan.profile.idle_s,
            "iteration_s": plan.profile.iteration_s,
            "spans": len(plan.profile.spans),
            "deadline": plan.profile.deadline,
            "bandwidth_bytes_per_s": plan.link.bandwidth_bytes_per_s,
            "startup_s": plan.link.startup_s,
            "buffer_bytes": plan.chunking.window_bytes,
        }
        self._append(state, "plans.jsonl", line)

    def verified(self, state: Any, index: int, version: int | None) -> None:
        """A version was compared with its replicas; every rank says so."""
        if version is not None:
            rank = state.identity.global_rank
            _append(self.folder / "verified" / f"rank{rank}.jsonl", {"index": index, "version": version})

    def _append(self, state: Any, name: str, line: dict[str, Any]) -> None:
        if state.identity.global_rank == 0:
            _append(self.folder / name, line)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def zero_config(width: int) -> dict[str, Any]:
    """ZeRO-3 that gathers one layer at a time, when it is needed, and reduces each layer's gradients by themselves."""
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": BATCH,
    }


def main(path: Path) -> None:
    """Trains through all turns."""
    settings = json.loads(path.read_text())
    torch.set_num_threads(1)
    pl.seed_everything(settings["turns"]["seed"], verbose=False)
    turns, model = take_turns(**settings["turns"]), settings["model"]
    patience = 20 + 6 * settings["gemini"]["profile_iterations"]
    folder = Path(settings["folder"])
    trainer = pl.Trainer(
        strategy=lightning_gemini.GeminiStrategy(config=zero_config(model["width"]), **settings["gemini"]),
        accelerator="cpu",
        devices=1,
        num_nodes=settings["machines"],
        max_steps=-1,
        max_epochs=1,
        callbacks=[Alternation(turns, folder, patience=patience, verify_all=settings["verify_all"])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    rows = (patience + len(turns) + 2) * BATCH * settings["machines"]
    data = TensorDataset(torch.randn(rows, model["width"]))
    trainer.fit(Net(**model), DataLoader(data, batch_size=BATCH))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
