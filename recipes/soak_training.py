"""What ``recipes/soak.py`` trains: small, quick to start, and with everything that must come back exactly.

    lightning-gemini run --local-nodes 6 recipes/soak_training.py DIRECTORY [SECONDS_PER_STEP [CHECKPOINT_EVERY]]

ZeRO-3, dropout, shuffled data, a learning-rate schedule. It trains until the optimizer step that
``DIRECTORY/last_step`` names; the file may appear while it trains. Every rank then writes what the weights are to
``DIRECTORY/final``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gemini

WIDTH, CLASSES, ROWS, BATCH = 64, 8, 1536, 4
PERSIST_EVERY_S = 3.0


class Net(pl.LightningModule):
    """A classifier of random points."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in range(3)]
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        features, labels = batch
        return nn.functional.cross_entropy(self.layers(features), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Steps(pl.Callback):
    """Writes down every step of this rank, and ends the training at the step that the file names.

    Args:
        folder: See the module.
        step_s: Sleeps so long in every step.
    """

    def __init__(self, folder: Path, step_s: float) -> None:
        self.folder, self.step_s = folder, step_s
        self.about = {
            "rank": int(os.environ.get("RANK", "0")),
            "node": int(os.environ.get("LIGHTNING_GEMINI_NODE", "0")),
            "generation": int(os.environ.get("LIGHTNING_GEMINI_GENERATION", "0")),
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        record = {"time": time.time(), "step": step, "loss": float(outputs["loss"]), **self.about}
        # Unbuffered and in one write: SIGKILL at any moment leaves only whole lines.
        with (self.folder / "steps" / f"rank{trainer.global_rank}.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(record).encode() + b"\n")
        time.sleep(self.step_s)
        last = self.folder / "last_step"
        # Written long before that step comes, so every rank has seen it by then.
        if last.exists() and step >= int(last.read_text()):
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        digest = hashlib.sha256()
        with deepspeed.zero.GatheredParameters(list(pl_module.parameters())):
            for name, value in pl_module.state_dict().items():
                digest.update(name.encode() + value.contiguous().numpy().tobytes())
        rate = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
        result = {"step": trainer.global_step, "weights": digest.hexdigest(), "learning_rate": rate}
        (self.folder / "final" / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def main(folder: Path, step_s: float, checkpoint_every: int) -> None:
    """Trains."""
    for name in ("steps", "final"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pl.seed_everything(5, verbose=False)
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        strategy=lightning_gemini.GeminiStrategy(persist_every_s=PERSIST_EVERY_S, checkpoint_every=checkpoint_every),
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[Steps(folder, step_s)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(ROWS, WIDTH, generator=draw), torch.randint(CLASSES, (ROWS,), generator=draw))
    trainer.fit(Net(), DataLoader(data, batch_size=BATCH, shuffle=True))


if __name__ == "__main__":
    where, step_seconds, every = (*sys.argv[1:], *("0.0", "1")[len(sys.argv) - 2 :])
    main(Path(where), float(step_seconds), int(every))
