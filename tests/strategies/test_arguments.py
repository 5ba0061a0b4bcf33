"""Every argument of DeepSpeedStrategy still means what it meant."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy

from lightning_gemini import GeminiStrategy


def zero(strategy: DeepSpeedStrategy) -> dict[str, Any]:
    assert isinstance(strategy.config, dict)
    return dict(strategy.config["zero_optimization"])


def test_arguments_by_name_give_the_same_configuration() -> None:
    arguments: dict[str, Any] = {
        "stage": 1,
        "allgather_bucket_size": 1234,
        "overlap_comm": False,
        "zero_optimization": True,
    }
    assert GeminiStrategy(**arguments).config == DeepSpeedStrategy(**arguments).config


def test_arguments_by_position_give_the_same_configuration() -> None:
    assert GeminiStrategy(None, True, 1).config == DeepSpeedStrategy(None, True, 1).config
    assert zero(GeminiStrategy(None, True))["stage"] == 3, "ZeRO-3 unless the user says otherwise"
    assert GeminiStrategy(None, True).config == DeepSpeedStrategy(None, True, 3).config


def test_every_argument_is_accepted() -> None:
    parameters = inspect.signature(DeepSpeedStrategy.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ("self", "stage", "remote_device")}
    assert len(defaults) > 30
    assert GeminiStrategy(stage=2, **defaults).config == DeepSpeedStrategy(stage=2, **defaults).config
    with pytest.raises(TypeError, match="no_such_argument"):
        GeminiStrategy(no_such_argument=1)


def test_a_configuration_of_ones_own(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    assert GeminiStrategy(config=config).config == config
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config))
    assert GeminiStrategy(config=path).config == config


def test_arguments_of_our_own() -> None:
    strategy = GeminiStrategy(replicas=2, placement="ring", checkpoint_every=5, persist_dir="here", persist_every_s=60)
    config = strategy.checkpoint_config
    assert (config.replicas, config.placement, config.checkpoint_every) == (2, "ring", 5)
    assert (config.persist_dir, config.persist_every_s) == (Path("here"), 60)
    assert "replicas" not in json.dumps(strategy.config)
