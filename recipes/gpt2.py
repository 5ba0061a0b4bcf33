"""GPT-2 on English Wikipedia with DeepSpeed ZeRO, checkpointed every iteration into its own and a peer's memory.

    lightning-gemini run --local-nodes 4 recipes/gpt2.py          # four machines made on this one, tiny model, CPU
    lightning-gemini inject --kind hardware --node 2              # meanwhile: kill one of them; training goes on
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-endpoint HOST:29400 recipes/gpt2.py \
        model=xl data=wikipedia trainer=gpu                       # the same line on every machine of a cluster
    python recipes/gpt2.py trainer.devices=2                      # no launcher: kill -9 it, type it again, it resumes
    python recipes/gpt2.py --cfg job                              # every setting (conf/), all of them overridable

Model, data and optimizer are as they would be without this project; ``GeminiStrategy`` is the whole difference.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import hydra
import lightning.pytorch as pl
import torch
from blocks import Blocks, TokenizerConfig, tokenise
from omegaconf import DictConfig
from settings import conf_dir
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup
from wikipedia import Source, excerpt, hub

import lightning_gemini
from lightning_gemini.config import CheckpointConfig


class GPT2(pl.LightningModule):
    """A randomly initialised Hugging Face GPT-2, trained to predict the next token.

    Args:
        model: ``conf/model``: sizes and dropout.
        optimizer: ``conf/gpt2.yaml``: learning rate, weight decay, betas and warm-up steps.
        seed: Dropout differs between ranks: each draws from ``seed + its global rank``.
    """

    def __init__(self, model: DictConfig, optimizer: DictConfig, seed: int) -> None:
        super().__init__()
        self.sizes, self.settings, self.seed = model, optimizer, seed
        self.gpt2: GPT2LMHeadModel | None = None

    def configure_model(self) -> None:
        """Builds the model where ZeRO-3 splits every layer among the ranks as soon as it exists."""
        if self.gpt2 is not None:
            return
        sizes = {str(name): value for name, value in self.sizes.items() if name != "dropout"}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.sizes.dropout)
        self.gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, use_cache=False, bos_token_id=0, eos_token_id=0))
        body = self.gpt2.transformer
        # Initialised again, because GPT2LMHeadModel saw only the empty shells of layers already split among the ranks.
        for part in (body.wte, body.wpe, *body.h, body.ln_f):
            with deepspeed.zero.GatheredParameters(list(part.parameters()), modifier_rank=0):
                part.apply(self.gpt2._init_weights)
        torch.manual_seed(self.seed + self.global_rank)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy of (micro_batch, block_tokens) int64 tokens, in nats a token."""
        assert self.gpt2 is not None
        loss: torch.Tensor = self.gpt2(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, weight decay on matrices only, linear warm-up and a cosine to zero at the last step."""
        decayed = [p for name, p in self.named_parameters() if name.endswith("weight") and ".ln_" not in name]
        others = [p for name, p in self.named_parameters() if not name.endswith("weight") or ".ln_" in name]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.settings.learning_rate,
            betas=tuple(self.settings.betas),
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = get_cosine_schedule_with_warmup(optimizer, self.settings.warmup_steps, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepLog(pl.Callback):
    """Appends a line for every optimizer step of this rank to ``steps/rank{R}.jsonl`` in the run directory.

    JSON keeps floats exactly, so two runs can be compared bit for bit. A step that is trained again after a recovery
    gets another line.

    Args:
        folder: Directory of the files; ``None`` writes none and only prints.
        tokens: Tokens that this rank trains on in a step.
        print_every: Global rank 0 prints every so many steps.
    """

    def __init__(self, folder: Path | None, tokens: int, print_every: int) -> None:
        self.folder, self.tokens, self.print_every = folder, tokens, print_every
        self.node = int(os.environ.get("LIGHTNING_GEMINI_NODE", os.environ.get("GROUP_RANK", 0)))
        self.last_step = -1
        self.losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run has its first steps behind it already."""
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the step, once for all the batches that it accumulates."""
        self.losses.append(outputs["loss"].detach())  # Lightning has divided it by the number of accumulated batches
        step, rank = trainer.global_step, trainer.global_rank
        if step == self.last_step:
            return
        printed = trainer.is_global_zero and step % self.print_every == 0
        if self.folder is not None or printed:
            loss = functools.reduce(operator.add, map(float, self.losses))  # waits for the device
            if self.folder is not None:
                self._append({"time": time.time(), "step": step, "loss": loss, "rank": rank})
            if printed:
                print(f"step {step:6d}  loss {loss:.4f}", flush=True)
        self.last_step = step
        self.losses.clear()

    def _append(self, record: dict[str, Any]) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        record |= {"node": self.node, "tokens": self.tokens}
        # Unbuffered and in one write: SIGKILL at any moment leaves only whole lines.
        with (self.folder / f"rank{record['rank']}.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(record).encode() + b"\n")


def main(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> None:
    """Trains until ``trainer.max_steps``; continues by itself where an earlier process of the same job was killed."""
    # DeepSpeed calls collectives by the names that torch has just renamed: a warning at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    pl.seed_everything(cfg.seed, verbose=False)
    world_size = int(os.environ.get("WORLD_SIZE", cfg.trainer.devices * cfg.trainer.num_nodes))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", cfg.trainer.devices))
    run_dir = os.environ.get("LIGHTNING_GEMINI_RUN_DIR")
    step_tokens = cfg.trainer.micro_batch * cfg.trainer.accumulate_grad_batches * cfg.data.block_tokens
    folder = Path(run_dir) / "steps" if run_dir else None
    trainer = pl.Trainer(
        strategy=strategy(cfg),
        accelerator=cfg.trainer.accelerator,
        devices=devices,
        num_nodes=world_size // devices,
        precision=cfg.trainer.precision,
        max_steps=cfg.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        callbacks=[StepLog(folder, step_tokens, cfg.trainer.log_every_n_steps), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(GPT2(cfg.model, cfg.optimizer, cfg.seed), loader(cfg))


def strategy(cfg: DictConfig) -> lightning_gemini.GeminiStrategy:
    """The one line that differs from an ordinary DeepSpeed run."""
    gemini = {field.name: cfg.gemini[field.name] for field in dataclasses.fields(CheckpointConfig)}
    return lightning_gemini.GeminiStrategy(stage=cfg.optimizer.zero_stage, **gemini)


def loader(cfg: DictConfig) -> DataLoader[torch.Tensor]:
    """Shuffled blocks of Wikipedia; an ordinary loader, which the strategy resumes at the very next batch."""
    tokenizer = TokenizerConfig(vocab_size=cfg.model.vocab_size, **cfg.data.tokenizer)
    blocks = Blocks(tokenise(source(cfg.data), tokenizer, Path(cfg.data.cache_dir)), cfg.data.block_tokens)
    return DataLoader(
        blocks, batch_size=cfg.trainer.micro_batch, shuffle=True, drop_last=True, num_workers=cfg.trainer.data_workers
    )


def source(data: DictConfig) -> Source:
    """The corpus that ``conf/data`` names."""
    if data.source == "excerpt":
        return excerpt(data.articles)
    return hub(data.path, data.name, data.split, data.articles)


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=conf_dir(), config_name="gpt2")(main)()
