"""The recipe on a real cluster of two nodes, with real SIGKILLs: a small `make demo`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, str(ROOT / "recipes" / "demo.py"), "--dir", "demo"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SMALL = [
    "gemini.operator.nodes=2",
    "trainer.max_steps=16",
    "data.articles=20",
    "gemini.failure.kinds=[software,hardware]",
]


@pytest.mark.timeout(600)
def test_a_small_demo_proves_that_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    command = [*DEMO, "--seed", str(seed), *SMALL]
    demo = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=580)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert [failure["kind"] for failure in report["failures"]] == ["software", "hardware"]
    assert [failure["tiers"]["remote_memory"] for failure in report["failures"]] == [0, 1]
    assert all(failure["killed_pids"] and failure["lost_steps"] <= 2 for failure in report["failures"])
    assert report["loss"]["bit_identical"] is True
    assert len(report["loss"]["interrupted"]) == 16
    assert report["loss"]["interrupted"][-1] < report["loss"]["interrupted"][0]
    assert report["checkpoint"]["bytes_per_rank"] > 1e6
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= {"events.jsonl", "timeline.png", "report.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "runs"}  # runs/cache, and nothing of Hydra's


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_told_to_end_takes_its_job_with_it(tmp_path: Path, number: int, code: int) -> None:
    # A shell starts what it runs in the background deaf to SIGINT: `nohup make test &`.
    options = {"stdout": subprocess.DEVNULL, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([*DEMO, *SMALL], cwd=tmp_path, env=ENVIRONMENT, **options) as demo:
        while not (tmp_path / "demo" / "without" / "job.json").exists():
            assert demo.poll() is None
            time.sleep(0.1)
        launcher = json.loads((tmp_path / "demo" / "without" / "job.json").read_text())["launcher_pid"]
        time.sleep(1.0)
        demo.send_signal(number)
        assert demo.wait(timeout=90) == code
    assert not Path(f"/proc/{launcher}").exists()
