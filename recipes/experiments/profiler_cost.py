"""What it costs to profile training all the time, measured on real ZeRO-3 training of two ranks.

    python recipes/experiments/profiler_cost.py                   # some minutes; result.json in runs/profiler_cost
    python recipes/experiments/profiler_cost.py --wait-ms 0       # nothing but the CPU's own work: noisier

Blocks of iterations with and without the tap on DeepSpeed's collectives alternate in one run, in another order each
round. Every layer computes, and then waits for ``--wait-ms`` in its forward pass and twice that in its backward pass,
as if an accelerator computed. What one recorded collective costs is measured by itself, in a loop. Times are given as
they pass, and as the process uses the CPU (all its threads), which a machine that is busy otherwise disturbs less.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LOCAL_SIZE", "2")  # else DeepSpeed starts `numactl` several times an iteration

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from interference_training import BATCH, Net, zero_config
from torch.utils.data import DataLoader, TensorDataset
from turns import Turn, take_turns

import lightning_gemini
from lightning_gemini.dataplane.collective_tap import CollectiveTap
from lightning_gemini.dataplane.pace_page import PacePage
from lightning_gemini.dataplane.profiler import Profiler

RANKS, SETTLING, WARM_UP = 2, 2, 20
WITH, WITHOUT = "with", "without"
CPU = torch.device("cpu")


class Alternation(pl.Callback):
    """Profiles in the blocks whose turn it is, and keeps what every iteration took.

    Attributes:
        seconds: Turn and seconds of every iteration that counts; ``cpu_seconds``: those of the CPU.
        collectives: Of the last iteration that was profiled.
    """

    def __init__(self, turns: list[Turn]) -> None:
        self.turns = turns
        self.seconds: list[tuple[Turn, float]] = []
        self.cpu_seconds: list[tuple[Turn, float]] = []
        self.collectives = 0
        self._profiler, self._tap = Profiler(PacePage.private(), CPU), None
        self._index, self._since, self._cpu_since = -1, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()  # it would stop one rank or another at times of its own
        optimizer = trainer.strategy.deepspeed_engine.optimizer.optimizer  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(lambda *_: self._step())

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        if self._index >= 0 and self.turns[self._index].counted:
            self.seconds.append((self.turns[self._index], now - self._since))
            self.cpu_seconds.append((self.turns[self._index], cpu_now - self._cpu_since))
        self._index, self._since, self._cpu_since = self._index + 1, now, cpu_now
        turn = self.turns[self._index] if self._index < len(self.turns) else Turn(WITHOUT, -1, True, False)
        if turn.switched:
            self._switch(turn.scheme == WITH)
        if self._tap is not None and (found := self._profiler.begin_iteration()) is not None:
            self.collectives = len(found[1].collectives)

    def _switch(self, on: bool) -> None:
        if self._tap is not None:
            self._tap.remove()
        self._tap = CollectiveTap(self._profiler) if on else None
        if self._tap is not None:
            self._tap.install()

    def _step(self) -> None:
        if self._tap is not None:
            self._profiler.step_began()


def train(arguments: argparse.Namespace) -> Alternation:
    """All turns, on both ranks."""
    turns = [Turn(WITHOUT, -1, index == 0, False) for index in range(WARM_UP)] + take_turns(
        (WITH, WITHOUT), rounds=arguments.rounds, counted=arguments.block, settling=SETTLING, seed=arguments.seed
    )
    torch.set_num_threads(1)
    pl.seed_everything(arguments.seed, verbose=False)
    alternation = Alternation(turns)
    trainer = pl.Trainer(
        strategy=lightning_gemini.GeminiStrategy(config=zero_config(arguments.width), checkpoint_every=0),
        accelerator="cpu",
        devices=RANKS,
        max_steps=len(turns) + 1,  # the last one only ends the one before
        callbacks=[alternation],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn((len(turns) + 1) * BATCH * RANKS, arguments.width))
    trainer.fit(Net(arguments.layers, arguments.width, arguments.wait_ms / 1e3), DataLoader(data, batch_size=BATCH))
    return alternation


def overhead(seconds: list[tuple[Turn, float]], seed: int) -> tuple[float, float, float]:
    """Median over the rounds of what profiling adds to an iteration, as a part, and its 95 % interval (bootstrap)."""
    rounds = sorted({turn.round for turn, _ in seconds})

    def median(scheme: str, number: int) -> float:
        return statistics.median(s for turn, s in seconds if (turn.scheme, turn.round) == (scheme, number))

    parts = [median(WITH, number) / median(WITHOUT, number) - 1 for number in rounds]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(parts, k=len(parts))) for _ in range(4000))
    return statistics.median(parts), medians[100], medians[-101]


def row(scheme: str, seconds: list[tuple[Turn, float]], cpu_seconds: list[tuple[Turn, float]]) -> dict[str, Any]:
    """Median and quartiles of an iteration."""
    found = [s for turn, s in seconds if turn.scheme == scheme]
    low, median, high = statistics.quantiles(found, n=4)
    return {
        "tap": scheme,
        "iterations": len(found),
        "iteration_s_median": median,
        "iteration_s_low": low,
        "iteration_s_high": high,
        "cpu_s_median": statistics.median(s for turn, s in cpu_seconds if turn.scheme == scheme),
    }


def costs_of_one() -> dict[str, float]:
    """CPU seconds that recording one collective adds: blocking, asynchronous, and its part of the trace."""
    profiler = Profiler(PacePage.private(), CPU)
    profiler.begin_iteration()
    tensor = torch.ones(1)
    gloo = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)

    def alone(value: torch.Tensor) -> Any:
        return gloo.allreduce([value])

    def waited(call: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        return lambda value: call(value).wait()

    tap = CollectiveTap(profiler)
    nothing = tap.reporting("all_reduce", lambda value: None)
    costs = {
        "blocking_s": added(nothing, lambda value: None, tensor, profiler),
        "asynchronous_s": added(waited(tap.reporting("all_reduce", alone)), waited(alone), tensor, profiler),
    }
    return {**costs, "trace_s": trace_s(profiler, nothing, tensor)}


def added(recorded: Callable[..., Any], plain: Callable[..., Any], tensor: torch.Tensor, profiler: Profiler) -> float:
    """Median difference between the two calls, in CPU seconds."""
    differences = []
    for _ in range(100):
        profiler.begin_iteration()
        differences.append(loop_s(recorded, tensor) - loop_s(plain, tensor))
    return statistics.median(differences)


def loop_s(call: Callable[..., Any], tensor: torch.Tensor, times: int = 50) -> float:
    """CPU seconds of one call, in all threads."""
    began = time.process_time()
    for _ in range(times):
        call(tensor)
    return (time.process_time() - began) / times


def trace_s(profiler: Profiler, nothing: Callable[..., Any], tensor: torch.Tensor, collectives: int = 200) -> float:
    """CPU seconds of the end of an iteration, for each of its collectives."""
    found = []
    for _ in range(100):
        loop_s(nothing, tensor, collectives)
        profiler.step_began()
        began = time.process_time()
        profiler.begin_iteration()
        found.append((time.process_time() - began) / collectives)
    return statistics.median(found)


def report(arguments: argparse.Namespace, alternation: Alternation) -> dict[str, Any]:
    """What ``result.json`` says."""
    part, low, high = overhead(alternation.seconds, arguments.seed)
    cpu_part, cpu_low, cpu_high = overhead(alternation.cpu_seconds, arguments.seed)
    rows = [row(scheme, alternation.seconds, alternation.cpu_seconds) for scheme in (WITHOUT, WITH)]
    costs = costs_of_one()
    iteration_s = rows[0]["iteration_s_median"]
    each = max(costs["blocking_s"], costs["asynchronous_s"]) + costs["trace_s"]
    return {
        "experiment": "profiler_cost",
        "command": shlex.join(sys.argv),
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "platform": platform.platform()},
        "model": {"layers": arguments.layers, "width": arguments.width, "wait_ms": arguments.wait_ms, "ranks": RANKS},
        "rows": rows,
        "collectives_per_iteration": alternation.collectives,
        "overhead": part,
        "overhead_low": low,
        "overhead_high": high,
        "cpu_overhead": cpu_part,
        "cpu_overhead_low": cpu_low,
        "cpu_overhead_high": cpu_high,
        **costs,
        "recording_share": alternation.collectives * each / iteration_s,
    }


def print_result(result: dict[str, Any]) -> None:
    for line in result["rows"]:
        low, median, high = (1e3 * line[f"iteration_s_{name}"] for name in ("low", "median", "high"))
        print(
            f"{line['tap']:8s} {line['iterations']} iterations, {median:.2f} ms (quartiles {low:.2f} to {high:.2f}), "
            f"{1e3 * line['cpu_s_median']:.2f} ms of CPU"
        )
    for name, what in (("overhead", "of the time"), ("cpu_overhead", "of the CPU's time")):
        low, high = result[f"{name}_low"], result[f"{name}_high"]
        print(f"overhead {result[name]:+.2%} {what} (95 %: {low:+.2%} to {high:+.2%})")
    blocking, late, trace = (1e6 * result[name] for name in ("blocking_s", "asynchronous_s", "trace_s"))
    print(
        f"one collective: {blocking:.1f} µs blocking, {late:.1f} µs asynchronous, and {trace:.1f} µs of the trace; "
        f"{result['collectives_per_iteration']} of them: {result['recording_share']:.2%} of an iteration"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="blocks with, and as many without")
    parser.add_argument("--block", type=int, default=15, help="iterations of a block whose time counts")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--wait-ms", type=float, default=2.0, help="in the forward pass of a layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("runs/profiler_cost"))
    arguments = parser.parse_args()
    alternation = train(arguments)  # starts this very command as the second rank
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        result = report(arguments, alternation)
        arguments.dir.mkdir(parents=True, exist_ok=True)
        (arguments.dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print_result(result)


if __name__ == "__main__":
    main()
