"""Reads a checkpoint directory with DeepSpeed alone, and trains on for a step; takes ``training.py``'s arguments.

Then rank 0 converts it to a Universal Checkpoint, beside the directory.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from training import CLASSES, FEATURES, Options, body, full_weights  # type: ignore[import-not-found]


class Plain(torch.nn.Module):
    """The module of the Lightning script, without Lightning."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(body(options.body, options.width), torch.nn.Linear(options.width, CLASSES))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self.model[0][0].requires_grad_(not options.frozen)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(features)
        return found


def main() -> None:
    fields = json.loads(Path(sys.argv[1]).read_text())
    options = Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    assert isinstance(options.strategy, dict)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    module = Plain(options)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": options.strategy["stage"]},
        "zero_allow_untested_optimizer": True,
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(trained, lr=0.05), config=config, model_parameters=trained
    )
    path, _ = engine.load_checkpoint(options.strategy["persist_dir"], load_module_strict=True)
    assert path is not None
    weights = full_weights(engine.module)
    if dist.get_rank() == 0:
        with (Path(options.out) / "rank0.jsonl").open("a") as lines:
            lines.write(json.dumps({"kind": "plain", "step": engine.global_steps, "weights": weights}) + "\n")
    loss = engine(torch.ones(4, FEATURES)).sum()
    engine.backward(loss)
    engine.step()
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 0:
        convert_to_universal(Path(options.strategy["persist_dir"]), options.strategy["stage"])


def convert_to_universal(directory: Path, stage: int) -> None:
    name = (directory / "latest").read_text()
    settings = Namespace(
        input_folder=str(directory / name),
        output_folder=str(directory.with_name("universal") / name),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=stage < 3,  # as for every checkpoint of ZeRO 1 and 2 whose client is not Megatron
    )
    ds_to_universal.main(settings)


if __name__ == "__main__":
    main()
