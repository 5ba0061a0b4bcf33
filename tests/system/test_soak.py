"""Three minutes of everything that can happen, and the proof that nothing is wrong afterwards: a short `make soak`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINUTES = 3


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Agents' sockets must fit in 100 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.timeout(420)
def test_nothing_is_wrong_after_three_minutes_of_faults(short_path: Path, seed: int) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "soak.py"), "--minutes", str(MINUTES), "--seed", str(seed)]
    output = short_path / "output.txt"
    with output.open("wb") as terminal:
        where = {"cwd": short_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
        soak = subprocess.Popen([*command, "--dir", "soak"], stdout=terminal, stderr=terminal, **where)
    try:
        code = soak.wait(380)
    finally:
        soak.terminate()  # takes its jobs with it
        soak.wait(35)
    assert code == 0, output.read_text()
    summary = json.loads((short_path / "soak" / "summary.json").read_text())
    assert summary["violations"] == []
    assert hex(seed) in summary["command"]
    # Not much for a fast machine, but on the slowest the faults must have happened too.
    assert sum(summary["faults"].values()) >= 10
    assert len(summary["faults"]) >= 4
    assert sum(summary["recoveries"].values()) >= 4
    assert sum(summary["missed"].values()) <= sum(summary["faults"].values())
