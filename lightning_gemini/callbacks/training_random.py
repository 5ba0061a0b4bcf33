"""The random state of training: python, numpy, torch and CUDA."""

from __future__ import annotations

from typing import Any

import torch

from lightning_gemini.callbacks.data_position.random_state import RandomState


def capture_random() -> dict[str, Any]:
    """Every generator's state, in plain values; cheap, and without waiting for the GPU."""
    state = RandomState.capture().to_plain()
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Go on with the same random numbers as when ``state`` was captured."""
    RandomState.from_plain(state).restore_process()
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
