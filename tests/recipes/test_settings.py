from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import settings
from hydra.errors import MissingConfigException

from lightning_gemini.config import CheckpointConfig

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def checkpoint_config(*overrides: str) -> CheckpointConfig:
    gemini = settings.settings(*overrides).gemini
    return CheckpointConfig(**{field.name: gemini[field.name] for field in dataclasses.fields(CheckpointConfig)})


def test_defaults_are_those_of_the_package() -> None:
    assert checkpoint_config() == CheckpointConfig()


@pytest.mark.parametrize("group", ["placement", "schedule", "transport", "persist", "kv", "operator", "failure"])
def test_every_option_of_every_gemini_group_is_possible(group: str) -> None:
    assert options(f"gemini/{group}")
    for option in options(f"gemini/{group}"):
        checkpoint_config(f"gemini/{group}={option}")  # refuses impossible values


def test_any_default_can_be_overridden() -> None:
    config = checkpoint_config("gemini.replicas=3", "gemini.checkpoint_every=0", "gemini/persist=disabled")
    assert (config.replicas, config.checkpoint_every, config.persist_every_s) == (3, 0, 0.0)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(MissingConfigException):
        settings.settings("gemini/placement=star")


@pytest.mark.parametrize("model", options("model"))
def test_every_size_can_be_built(model: str) -> None:
    sizes = settings.settings(f"model={model}").model
    assert sizes.n_embd % sizes.n_head == 0
    assert sizes.n_inner in (4 * sizes.n_embd, 20480)


@pytest.mark.parametrize(
    ("model", "billions"), [("small", 0.124), ("medium", 0.355), ("large", 0.774), ("xl", 1.558), ("100b", 100.27)]
)
def test_sizes_are_those_of_the_papers(model: str, billions: float) -> None:
    sizes = settings.settings(f"model={model}").model
    layer = 4 * sizes.n_embd**2 + 2 * sizes.n_embd * sizes.n_inner + 9 * sizes.n_embd + sizes.n_inner
    embeddings = (sizes.vocab_size + sizes.n_positions + 2) * sizes.n_embd
    assert (sizes.n_layer * layer + embeddings) / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiments_compose(experiment: str) -> None:
    assert settings.settings(f"experiment={experiment}").trainer.max_steps > 0


def test_the_recipe_shows_its_settings_and_leaves_no_files(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "gpt2.py"), "--cfg", "job", "model=small"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0, shown.stderr
    assert "n_embd: 768" in shown.stdout
    assert list(tmp_path.iterdir()) == []
