"""Where positions are in a checkpoint: in a place where plain Lightning does not trip over them.

Lightning raises when a checkpoint has more loader states than the run has loaders with state, and ordinary loaders
have none without this package. So the positions travel under a key of their own, and are put back when this package
loads them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["put_back_positions", "set_aside_positions"]

KEY = "lightning_gemini_loaders"
_LIGHTNINGS = "combined_loader"


def set_aside_positions(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint, which stays as it is, with the positions of its train loaders under `KEY`."""
    progress = _fit_progress(checkpoint)
    if _LIGHTNINGS not in progress:
        return checkpoint
    fit_loop = {**checkpoint["loops"]["fit_loop"]}
    fit_loop["state_dict"] = {name: value for name, value in progress.items() if name != _LIGHTNINGS}
    loops = {**checkpoint["loops"], "fit_loop": fit_loop}
    return {**checkpoint, "loops": loops, KEY: progress[_LIGHTNINGS]}


def put_back_positions(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `set_aside_positions`; changes the checkpoint and returns it."""
    if KEY in checkpoint:
        _fit_progress(checkpoint)[_LIGHTNINGS] = checkpoint.pop(KEY)
    return checkpoint


def _fit_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    progress: dict[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    return progress
