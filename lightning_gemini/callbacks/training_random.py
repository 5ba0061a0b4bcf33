"""The random state of training: python, numpy, torch and CUDA."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture_random() -> dict[str, Any]:
    """Every generator's state; cheap, and without waiting for the GPU."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Go on with the same random numbers as when ``state`` was captured."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
