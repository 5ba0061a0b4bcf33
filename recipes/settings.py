"""Where the recipes' Hydra configuration is, joined with the defaults in ``lightning_gemini.config``."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from lightning_gemini.config import CheckpointConfig

# conf/gemini says only what differs from these.
ConfigStore.instance().store(group="gemini", name="checkpoint", node=dataclasses.asdict(CheckpointConfig()))


def conf_dir() -> str:
    """``conf/`` of the checkout that this file stands in, or else the one that the package was installed with."""
    beside = Path(__file__).resolve().parent.parent / "conf"
    if beside.is_dir():
        return str(beside)
    return str(Path(str(importlib.import_module("lightning_gemini.conf").__file__)).parent)


def settings(*overrides: str) -> DictConfig:
    """The configuration that ``recipes/gpt2.py`` trains with when it is given these overrides."""
    with initialize_config_dir(config_dir=conf_dir(), version_base="1.3"):
        return compose("gpt2", overrides=list(overrides))
