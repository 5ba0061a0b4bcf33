"""What the callback refuses before anything is set up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_gemini import GeminiCheckpoint, GeminiStrategy
from lightning_gemini.errors import ConfigurationError


def test_the_callback_needs_the_strategy(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[GeminiCheckpoint()], default_root_dir=tmp_path, **quiet)
    with pytest.raises(ConfigurationError, match=r"needs Trainer\(strategy='gemini'\), found SingleDeviceStrategy"):
        trainer.fit(BoringModel())


def set_up(strategy: GeminiStrategy, stage: str = "fit") -> None:
    trainer: Any = SimpleNamespace(strategy=strategy)
    GeminiCheckpoint().setup(trainer, BoringModel(), stage)


NVME = {"device": "nvme", "nvme_path": "/tmp"}
REFUSED: dict[str, tuple[Any, str]] = {
    "no ZeRO": ({}, "needs ZeRO stage 1, 2 or 3"),
    "stage 0": ({"zero_optimization": {"stage": 0}}, "needs ZeRO stage 1, 2 or 3"),
    "old style": ({"zero_optimization": True}, "needs ZeRO stage 1, 2 or 3"),
    "optimizer on NVMe": ({"zero_optimization": {"stage": 3, "offload_optimizer": NVME}}, "offload to 'cpu' instead"),
    "parameters on NVMe": ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, "offload to 'cpu' instead"),
    "elastic": ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint must be off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_memory_cannot_hold_is_refused(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=message):
        set_up(GeminiStrategy(config=config))


def test_only_training_with_versions_has_limits() -> None:
    on_nvme: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": NVME}}
    set_up(GeminiStrategy(config=on_nvme), stage="test")
    set_up(GeminiStrategy(config=on_nvme, checkpoint_every=0))
    on_cpu: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    set_up(GeminiStrategy(config=on_cpu))
