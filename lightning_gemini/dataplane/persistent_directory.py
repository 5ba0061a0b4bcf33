"""What is in the directory of the persistent tier, and what a rank reads of it."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_gemini.dataplane import shard
from lightning_gemini.errors import PersistError

FINISHED = "gemini_finished"
_TAG = re.compile(r"global_step(\d+)(?:\.(\d+))?$")


def rank_file(rank: int) -> str:
    """Name of the file with what DeepSpeed does not keep of a rank: RNG, data position, buffers."""
    return f"gemini_rank_{rank:05d}.pt"


def probe(directory: Path) -> None:
    """Check that the directory can be written, before training starts.

    Raises:
        PersistError: It cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        test = directory / f".probe-{os.getpid()}"
        test.write_bytes(b"")
        test.unlink()
    except OSError as error:
        raise PersistError(
            f"persist_dir {directory} cannot be written ({error.strerror}): "
            "make it writable or choose another directory"
        ) from error


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(version, directory) of every whole checkpoint, the one that ``latest`` names first, then newest first.

    Those of later steps than that one come last: training went back behind them.
    """
    try:
        found = [(int(match[1]), int(match[2] or 0), path) for path, match in _tagged(directory)]
    except OSError:
        return []
    latest = latest_checkpoint(directory)
    newest = next((step for step, _, path in found if path == latest), math.inf)
    found.sort(key=lambda entry: (entry[2] != latest, entry[0] > newest, -entry[0], -entry[1]))
    return [(step, path) for step, _, path in found]


def _tagged(directory: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in directory.iterdir():
        if match := _TAG.match(path.name):
            yield path, match


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that ``latest`` names; it may not be there."""
    try:
        name = (directory / "latest").read_text().strip()
    except (OSError, ValueError):
        return None
    return directory / name if name else None


def is_finished(directory: Path) -> bool:
    """Whether the newest checkpoint there is the result of a job that ended well."""
    latest = latest_checkpoint(directory)
    return latest is not None and is_result(latest)


def is_result(path: Path) -> bool:
    """Whether a checkpoint is the last one of a job that ended well."""
    try:
        return (path / FINISHED).exists()
    except OSError:  # the disk is gone, and with it the checkpoint
        return False


def resumable(directory: Path) -> list[str]:
    """Names of the checkpoints that a new run may resume from by itself, best first."""
    if is_finished(directory):
        return []
    return [path.name for _, path in checkpoints(directory) if not is_result(path)]


def load(path: Path, rank: int, *, partitioned: bool) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Read one rank's state from a persistent checkpoint.

    Args:
        path: One checkpoint's directory (``.../global_step12``).
        rank: Global rank.
        partitioned: Whether weights are partitioned (ZeRO-3); otherwise rank 0 alone reads them.

    Returns:
        Stable and volatile state as the snapshot took them, and the world size that wrote them.

    Raises:
        PersistError: A file is missing or unreadable.
    """
    with _readable(path):
        mine = torch.load(path / rank_file(rank), map_location="cpu", weights_only=False)
        constant = shard.unpack(mine["constant"])
        stable: dict[str, Any] = {"constant": mine["constant"], "parameters": None, "frozen": None}
        optimizer = torch.load(path / constant["optimizer_file"], map_location="cpu", weights_only=False)
        stable["optimizer"] = optimizer["optimizer_state_dict"]
        if partitioned or rank == 0:
            model = torch.load(path / constant["model_file"], map_location="cpu", weights_only=False)
            buffers = mine["volatile"]["buffers"]
            stable["parameters"] = {name: value for name, value in model["module"].items() if name not in buffers}
            stable["frozen"] = model["frozen_param_fragments"] if partitioned else None
    return stable, mine["volatile"], int(mine["world_size"])


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise PersistError(f"the persistent checkpoint {path} cannot be read: {error}") from error
