"""Where a version takes a short cut it holds what DeepSpeed has at that moment; real engines in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stage", [1, 3])
def test_every_change_of_the_state_is_noticed(stage: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.strategies.captured_state", str(stage)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same:") == 22  # two drafts a change, one of which is given up, and numbers
