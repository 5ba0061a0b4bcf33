"""A ``lightning-gemini run`` that a recipe started: on the CPU, and ended politely."""

from __future__ import annotations

import os
import subprocess

_END_S = 60.0


def cpu_environment(**more: str) -> dict[str, str]:
    """The recipes' local clusters train on the CPU wherever they run."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **more}


def end(launcher: subprocess.Popen[bytes]) -> None:
    """The launcher takes everything down with it; it gets time for that."""
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()
