"""What a version costs the training thread, part by part, on real training of GPT-2 with ZeRO-3.

    python recipes/experiments/stall.py trainer.max_steps=170               # one rank, tiny: a shard of 8 MiB
    python recipes/experiments/stall.py model.n_layer=8 model.n_embd=320 model.n_inner=1280 model.n_head=5    # 120 MiB
    lightning-gemini run --local-nodes 2 recipes/experiments/stall.py       # two machines, a copy on the other

Any setting of ``recipes/gpt2.py`` can be given. Everything that checkpoints do on the training thread is timed: where a
batch is fetched, at the boundary between two iterations (with several machines, what training waits there for the
others is told apart), before the optimizer step (where training waits until its state has been read), and after it. The
limit is 1 ms + 0.02 x the time of a warm copy of the shard's bytes, taken beside it every iteration. Iterations with
and without checkpoints take turns in blocks, so that what the copying threads take from training shows, too. The parts
are told apart in every other block alone, as that takes time. Every time is also given as the training thread's CPU
time, which tells what others on the machine take. Results: ``result.json`` in ``runs/stall``.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LOCAL_SIZE", "1")  # else DeepSpeed starts `numactl` several times an iteration

import gpt2
import hydra
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from settings import conf_dir

from lightning_gemini.callbacks import gemini_checkpoint
from lightning_gemini.callbacks.data_position.position_tracker import PositionTracker
from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint
from lightning_gemini.callbacks.publisher import VersionPublisher
from lightning_gemini.callbacks.traffic import TrafficScheduler
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.profiler import Profiler
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.snapshot import Snapshot, Snapshotter
from lightning_gemini.strategies.zero_state import ZeroState

BLOCK, SETTLING, WARM_UP = 8, 2, 6
NONE = "none"
TOTAL = (
    (GeminiCheckpoint, "on_train_batch_start"),
    (VersionPublisher, "before_step"),
    (Profiler, "step_began"),
    (PositionTracker, "begin_fetch"),
)
PARTS = {
    "commit of the last version": (VersionPublisher, "settle"),
    "schedule": (TrafficScheduler, "begin_iteration"),
    "Lightning's state": (gemini_checkpoint, "lightning_state"),
    "random state": (gemini_checkpoint, "capture_random"),
    "ZeRO's state": (ZeroState, "capture"),
    "layout": (shard.Planner, "draft"),
    "beginning of the copy": (Snapshotter, "begin"),
    "before the step": (VersionPublisher, "before_step"),
    "of it, until the state is read": (Snapshot, "wait_until_read"),
    "progress": (Buffer, "report_progress"),
    "position in the data": (PositionTracker, "begin_fetch"),
}
WAIT = "waiting for the vote"


class Stopwatch:
    """Adds up seconds, and seconds of the CPU, by what was done.

    Attributes:
        in_parts: Whether the parts are told apart; that takes time itself, a part of which counts as theirs.
    """

    def __init__(self) -> None:
        self.in_parts = False
        self.seconds: Counter[str] = Counter()
        self.cpu_seconds: Counter[str] = Counter()
        self._running: set[str] = set()

    def install(self) -> None:
        """Times every part from now on."""
        for name, (owner, function) in PARTS.items():
            self._time(owner, function, name, part=True)
        for owner, function in TOTAL:
            self._time(owner, function, "stall")
        self._time(VersionPublisher, "_outcome_of_vote", WAIT)

    def _time(self, owner: Any, function: str, name: str, *, part: bool = False) -> None:
        call: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if name in self._running or (part and not self.in_parts):
                return call(*args, **kwargs)
            self._running.add(name)
            began, cpu_began = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.cpu_seconds[name] += time.thread_time() - cpu_began
                self._running.discard(name)

        setattr(owner, function, timed)

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """What came together since the last call, and in seconds of the CPU."""
        taken = dict(self.seconds), dict(self.cpu_seconds)
        self.seconds.clear()
        self.cpu_seconds.clear()
        return taken


class Measurement(pl.Callback):
    """Turns checkpoints on and off, block by block, and keeps what every iteration cost.

    Attributes:
        alone: Whether no other machine holds a copy, so that the vote waits for nobody.
        iterations: Scheme, seconds of the iteration, of its parts, and of a copy of the shard's bytes beside it.
    """

    def __init__(self, stopwatch: Stopwatch, scheme: str) -> None:
        self.stopwatch, self.scheme = stopwatch, scheme
        self.alone = False
        self.iterations: list[dict[str, Any]] = []
        self.shard_bytes = 0
        self._began: float | None = None
        self._index = -WARM_UP
        self._memory = torch.zeros(0), torch.zeros(0)
        self._memcpy_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A single machine has no traffic to schedule."""
        self.alone = trainer.strategy.job_state.memory.replicas == 1  # type: ignore[attr-defined]
        if self.alone:
            self.scheme = "eager"

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the strategy's own callback, which is the last one."""
        state = trainer.strategy.job_state  # type: ignore[attr-defined]
        now, memcpy_s = time.perf_counter(), self._memcpy_s
        seconds, cpu_seconds = self.stopwatch.take()
        if self._began is not None and self._index % BLOCK >= SETTLING and self._index >= 0:
            self.iterations.append(
                {
                    "scheme": self._turn(),
                    "in_parts": self.stopwatch.in_parts,
                    "iteration_s": now - self._began - memcpy_s,
                    "memcpy_s": memcpy_s,
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                }
            )
        self._index += self._began is not None
        self._began = now
        if self._index % BLOCK == 0 and self._index >= 0:
            self.stopwatch.in_parts = self._index // BLOCK % 4 == 2
            state.traffic.set_scheme(self._turn())

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        """Far from what is measured: it takes the caches."""
        self._memcpy_s = self._copy_s(trainer.strategy.job_state.slab.buffers)  # type: ignore[attr-defined]

    def _turn(self) -> str:
        return NONE if self._index // BLOCK % 2 else self.scheme

    def _copy_s(self, buffers: Any) -> float:
        size = max(buffer.data_bytes for buffer in buffers)
        if self._memory[0].numel() != size:
            self._memory = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
            self.shard_bytes = size
        source, target = self._memory
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    """Quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def row(measurement: Measurement, rank: int) -> dict[str, Any]:
    """One rank's figures, in seconds, and whether the stall is within its limit."""
    taken = [found for found in measurement.iterations if found["scheme"] != NONE]
    versions = [found for found in taken if not found["in_parts"]]
    in_parts = [found for found in taken if found["in_parts"]]
    without = [found["iteration_s"] for found in measurement.iterations if found["scheme"] == NONE]
    memcpy = spread([found["memcpy_s"] for found in versions])
    waits = [0.0 if measurement.alone else found["seconds"].get(WAIT, 0.0) for found in versions]
    stall = spread([found["seconds"]["stall"] - wait for found, wait in zip(versions, waits, strict=True)])
    limit = 1e-3 + 0.02 * memcpy["median"]
    parts = {
        name: {
            "seconds": spread([found["seconds"].get(name, 0.0) for found in in_parts]),
            "cpu_seconds": spread([found["cpu_seconds"].get(name, 0.0) for found in in_parts]),
        }
        for name in (*PARTS, WAIT)
    }
    return {
        "rank": rank,
        "scheme": measurement.scheme,
        "shard_bytes": measurement.shard_bytes,
        "iterations": len(versions),
        "stall_s": stall,
        "stall_cpu_s": spread([found["cpu_seconds"]["stall"] for found in versions]),
        "memcpy_s": memcpy,
        "limit_s": limit,
        "within": stall["median"] < limit,
        "iteration_s": spread([found["iteration_s"] for found in versions]),
        "iteration_without_s": spread(without),
        "parts": parts,
    }


def say(found: dict[str, Any]) -> None:
    """A rank's figures on the screen, in ms."""

    def ms(times: dict[str, float]) -> str:
        return f"{times['median'] * 1e3:8.3f} ({times['low'] * 1e3:.3f} to {times['high'] * 1e3:.3f})"

    print(f"rank {found['rank']}: shard of {found['shard_bytes'] / 2**20:.1f} MiB, {found['iterations']} versions; ms:")
    for name, times in found["parts"].items():
        print(f"  {name:32s}{ms(times['seconds']):36s} CPU {ms(times['cpu_seconds'])}")
    print(f"  {'training thread stalled':32s}{ms(found['stall_s']):36s} CPU {ms(found['stall_cpu_s'])}")
    print(f"  {'limit: 1 ms + 0.02 x memcpy':32s}{found['limit_s'] * 1e3:8.3f}, memcpy {ms(found['memcpy_s'])}")
    print(f"  {'iteration':32s}{ms(found['iteration_s'])}, without checkpoints {ms(found['iteration_without_s'])}")
    print(f"  {'within the limit' if found['within'] else 'BEYOND the limit'}", flush=True)


def main(cfg: DictConfig) -> None:
    """Trains, and rank 0 writes what all ranks found."""
    stopwatch = Stopwatch()
    stopwatch.install()
    measurement = Measurement(stopwatch, cfg.gemini.schedule)
    rows: list[Any] = []
    gpt2.main(cfg, [measurement, Collection(measurement, rows)])
    if rows:
        folder = Path("runs/stall")
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"processors": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__}
        result = {"experiment": "stall", "command": shlex.join(sys.argv), "machine": machine, "rows": rows}
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


class Collection(pl.Callback):
    """Brings all ranks' figures to rank 0 while they are still together."""

    def __init__(self, measurement: Measurement, rows: list[Any]) -> None:
        self.measurement, self.rows = measurement, rows

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(found, row(self.measurement, trainer.global_rank))
        if trainer.is_global_zero:
            self.rows.extend(found)
            for each in found:
                say(each)


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=conf_dir(), config_name="gpt2")(main)()
