"""What a checkpoint every iteration costs a GPU, on real training of GPT-2 that fills it.

    python recipes/experiments/device.py experiment=device                            # ZeRO-2, 49k tokens an iteration
    python recipes/experiments/device.py experiment=device optimizer.zero_stage=3 trainer.accumulate_grad_batches=1

Blocks of iterations take turns: without checkpoints, with one each, and with a plain ``cudaMemcpyAsync`` of as many
bytes into pinned memory in its place, by which the device copy is judged. Iterations are timed by events in the
device's stream, from one boundary between two optimizer steps to the next; so are the copies. Results: ``result.json``
in ``runs/device``.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt2
import hydra
import lightning.pytorch as pl
import torch
from measured import row as measured_row
from omegaconf import DictConfig
from settings import conf_dir
from turns import Turn, take_turns

from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint
from lightning_gemini.dataplane.shard import Layout
from lightning_gemini.dataplane.snapshot import Snapshotter

NONE, GEMINI, MEMCPY = "none", "gemini", "memcpy"
SCHEMES = (NONE, GEMINI, MEMCPY)
ROUNDS, COUNTED, SETTLING, WARM_UP = 5, 5, 1, 12
FOLDER = Path("runs/device")
_PART_BYTES = 1 << 30


def mark() -> torch.cuda.Event:
    """The device gets here after all that was enqueued in the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class PlainCopy:
    """Copies as many bytes as a version has into pinned memory, and does nothing else."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.source = torch.empty(_PART_BYTES, dtype=torch.uint8, device="cuda")
        self.target = torch.empty(_PART_BYTES, dtype=torch.uint8, pin_memory=True)

    def begin(self, size_bytes: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueues it behind what the current stream has; returns its begin and end."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            began = mark()
            for start in range(0, size_bytes, _PART_BYTES):
                part = slice(0, min(_PART_BYTES, size_bytes - start))
                self.target[part].copy_(self.source[part], non_blocking=True)
            return began, mark()


class Measurement(pl.Callback):
    """Turns checkpoints on and off, block by block, and keeps the device's times.

    Args:
        turns: Whose turn each iteration is, once all has warmed up.

    Attributes:
        iterations: Turn, begin and end of every iteration that counts.
        copies: Scheme, bytes, begin and end of every copy.
        versions: What each version cost, as the publisher says.
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.iterations: list[tuple[Turn, torch.cuda.Event, torch.cuda.Event]] = []
        self.copies: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self.versions: list[dict[str, Any]] = []
        warm_up = [Turn(GEMINI, 0, False, False)] * WARM_UP
        self._turns = iter([*warm_up, *turns])
        self._turn: Turn | None = None
        self._began: torch.cuda.Event | None = None
        self._step = -1
        self._plain: PlainCopy | None = None
        self._time_device_copies()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the strategy's own callback, which is the last one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        now = mark()
        if self._turn is None:
            (checkpoint,) = [each for each in trainer.callbacks if isinstance(each, GeminiCheckpoint)]  # type: ignore[attr-defined]
            checkpoint._publisher._write_record = self.versions.append  # type: ignore[union-attr]
            self._plain = PlainCopy()
        elif self._turn.counted and self._began is not None:
            self.iterations.append((self._turn, self._began, now))
        self._began, self._turn = now, next(self._turns, self._turn)
        assert self._turn is not None
        scheme = self._turn.scheme
        trainer.strategy.job_state.traffic.set_scheme("eager" if scheme == GEMINI else "none")  # type: ignore[attr-defined]
        if scheme == MEMCPY and self._plain is not None:
            size_bytes = self.copies[-1][1]
            self.copies.append((MEMCPY, size_bytes, *self._plain.begin(size_bytes)))

    def _time_device_copies(self) -> None:
        measurement, copy = self, Snapshotter._copy_tensors

        def timed(snapshotter: Any, snapshot: Any, layout: Layout, *rest: Any) -> None:
            began = mark()
            copy(snapshotter, snapshot, layout, *rest)
            size_bytes = sum(slot.nbytes for slot in layout.slots if slot.tensor.is_cuda)
            measurement.copies.append((GEMINI, size_bytes, began, mark()))

        Snapshotter._copy_tensors = timed  # type: ignore[method-assign]


def rows(measurement: Measurement, seed: int) -> list[dict[str, Any]]:
    """One for each scheme; times in seconds, rates in bytes/s. The device must be through."""
    rounds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn, began, ended in measurement.iterations:
        rounds[turn.scheme][turn.round].append(began.elapsed_time(ended) / 1e3)
    rates = defaultdict(list)
    for scheme, size_bytes, began, ended in measurement.copies:
        rates[scheme].append(size_bytes / (began.elapsed_time(ended) / 1e3))
    return [_row(scheme, rounds, rates[scheme], measurement, seed) for scheme in SCHEMES]


def _row(scheme: str, rounds: Any, rates: list[float], measurement: Measurement, seed: int) -> dict[str, Any]:
    found = measured_row(scheme, rounds[scheme], rounds[NONE], seed)
    found["copy_bytes_per_s"] = statistics.median(rates) if rates else None
    if scheme == GEMINI:
        names = "stall_s", "wait_s", "copy_s", "bytes"
        found |= {name: statistics.median(version[name] for version in measurement.versions) for name in names}
        found["skipped"] = measurement.versions[-1]["skipped"]
    return found


def say(row: dict[str, Any]) -> None:
    """A row on the screen."""
    rate = row["copy_bytes_per_s"]
    print(
        f"{row['scheme']:8s}{row['iterations']:4d} iterations, {row['iteration_s_median'] * 1e3:8.1f} ms "
        f"({row['iteration_s_low'] * 1e3:.1f} to {row['iteration_s_high'] * 1e3:.1f}), {row['overhead']:+.2%} "
        f"[{row['overhead_low']:+.2%}, {row['overhead_high']:+.2%}]"
        + (f", copies at {rate / 1e9:.1f} GB/s" if rate else "")
    )
    if "copy_s" in row:
        print(
            f"        a version of {row['bytes'] / 1e9:.2f} GB: complete after {row['copy_s'] * 1e3:.0f} ms, training "
            f"stalled {row['stall_s'] * 1e3:.2f} ms; {row['skipped']} skipped"
        )


def main(cfg: DictConfig) -> None:
    """Trains on one GPU a process; rank 0 writes what it found."""
    if not torch.cuda.is_available():
        raise SystemExit("device.py measures a CUDA device, and there is none here")
    turns = take_turns(SCHEMES, rounds=ROUNDS, counted=COUNTED, settling=SETTLING, seed=cfg.seed)
    cfg.trainer.max_steps = WARM_UP + len(turns) + 1
    measurement = Measurement(turns)
    gpt2.main(cfg, [measurement])
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    torch.cuda.synchronize()
    found = rows(measurement, cfg.seed)
    memory = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    machine = {"device": torch.cuda.get_device_name(), "memory_bytes": memory[1], "torch": torch.__version__}
    print(f"{machine['device']}, {memory[0] / 2**30:.1f} of {memory[1] / 2**30:.1f} GiB taken; device times:")
    for row in found:
        say(row)
    FOLDER.mkdir(parents=True, exist_ok=True)
    result = {"experiment": "device", "command": shlex.join(sys.argv), "machine": machine}
    result |= {"memory_taken_bytes": memory[0], "rows": found}
    (FOLDER / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=conf_dir(), config_name="gpt2")(main)()
