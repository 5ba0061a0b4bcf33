"""A Lightning script that nobody prepared: ``python plain_script.py STRATEGY OUT EPOCHS [SECONDS]``."""

from __future__ import annotations

import json
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

OUT = Path(sys.argv[2])
SLEEP_S = float(sys.argv[4]) if len(sys.argv) > 4 else 0.1  # in each step, so that there is time to disturb it


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        features, labels = batch
        loss = nn.functional.cross_entropy(self.layers(features), labels)
        self.log("loss", loss)
        time.sleep(0.0 if (OUT / "hurry").exists() else SLEEP_S)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class History(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        with (OUT / f"times{trainer.global_rank}.txt").open("a") as times:
            times.write(f"{len(self.losses)} {time.time()}\n")

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = list(state_dict["losses"])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with deepspeed.zero.GatheredParameters(list(pl_module.parameters())):
            weights = {name: value.tolist() for name, value in pl_module.state_dict().items()}
        result = {"weights": weights, "losses": self.losses, "steps": trainer.global_step}
        result["rates"] = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
        (OUT / f"result{trainer.global_rank}.json").write_text(json.dumps(result))


def main() -> None:
    pl.seed_everything(3, verbose=False)
    strategy: Any = sys.argv[1]
    if strategy.startswith("{"):
        strategy = lightning_gemini.GeminiStrategy(**json.loads(strategy))
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_epochs=int(sys.argv[3]),
        accumulate_grad_batches=2,
        callbacks=[History()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=OUT,
    )
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(160, 8, generator=draw), torch.randint(4, (160,), generator=draw))
    trainer.fit(Net(), DataLoader(data, batch_size=4, shuffle=True))


if __name__ == "__main__":
    main()
