"""Training on a disk in trouble: it goes on, is told, and its persistent tier comes back."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.strategies.jobs import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, too small for a single checkpoint."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    try:
        remount(path, "-t", "tmpfs", "-o", "size=16k", "gemini-test")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no mounts here: {error.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def remount(path: Path, *words: str) -> None:
    subprocess.run(["mount", *words, str(path)], check=True, capture_output=True)


def wait_for(words: str, log: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not log.exists() or words not in log.read_text():
        assert time.monotonic() < deadline, f"never said {words!r}"
        time.sleep(0.05)


def steps_of(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step").split(".")[0]) for path in directory.glob("global_step*"))


def test_a_disk_that_is_full_and_then_is_not(make_job: MakeJob, disk: Path) -> None:
    options: dict[str, Any] = {"pace_s": 0.1, "batches": 80, "trainer": {"max_epochs": 1}}
    job = make_job(strategy={"stage": 1, "persist_dir": str(disk), "persist_every_s": 0.01}, **options)
    helped: list[str] = []

    def help_out() -> None:
        wait_for("was not persisted", job.directory / "attempt0.log")
        helped.extend(path.name for path in disk.glob("global_step*"))
        remount(disk, "-o", "remount,size=8m")
        helped.append("done")

    watcher = threading.Thread(target=help_out, daemon=True)
    watcher.start()
    outcome = job.run()
    watcher.join()
    assert helped == ["done"], "no checkpoint before there was room for one"
    assert outcome.ended, outcome.output
    assert "No space left on device" in outcome.output
    assert "training goes on" in outcome.output
    assert "rank 0 persists again, after" in outcome.output
    assert outcome.output.count("was not persisted") <= 2, "each rank says it once"
    assert steps_of(disk)
    assert len(outcome.of("train")) == 80


def test_a_recovery_on_a_disk_that_turned_read_only(make_job: MakeJob, disk: Path) -> None:
    remount(disk, "-o", "remount,size=8m")
    persist = disk / "persist"
    job = make_job(strategy={"stage": 1, "persist_dir": str(persist), "persist_every_s": 0.01}, pace_s=0.1)
    job.run(stop={"hook": "on_train_batch_end", "step": 9})
    newest = steps_of(persist)[-1]
    job.kill_agent()
    remount(disk, "-o", "remount,ro")
    refused = job.run()  # somebody typed the command: tell them
    assert all(end.code for end in refused.exits)
    assert "cannot be written (Read-only file system): make it writable" in refused.output
    job.env["TORCHELASTIC_RESTART_COUNT"] = "1"  # a launcher carries the run on: training comes first
    outcome = job.run()
    assert outcome.ended, outcome.output
    assert (outcome.start["tier"], outcome.start["version"]) == ("persistent", newest), outcome.output
    assert "was not persisted" in outcome.output
    assert "Read-only file system" in outcome.output
