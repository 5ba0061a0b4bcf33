"""One process that has imported everything, and jobs that are forked from it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import DEVICE
from tests.strategies.jobs import Forks, Job, Outcome


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks") / "pool.log") as started:
        yield started


@pytest.fixture(scope="session")
def runtime() -> Iterator[Path]:
    """Sockets must have short paths."""
    path = Path(tempfile.mkdtemp(prefix="gemini-", dir="/tmp"))
    yield path
    left = [str(socket) for socket in path.rglob("*.sock")]
    shutil.rmtree(path)
    assert not left, f"agents left their sockets behind: {left}"


def _need_devices(count: int) -> None:
    if DEVICE == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs on a machine, found {torch.cuda.device_count()}")


@pytest.fixture
def make_job(forks: Forks, runtime: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(**options: Any) -> Job:
        _need_devices(options.get("nproc", 2))
        jobs.append(Job(forks, tmp_path / f"job{len(jobs)}", runtime, **options))
        return jobs[-1]

    yield make
    for job in jobs:
        job.forget()


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """The outcome of a run that nobody disturbs, without checkpoints; the same options run once only."""
    known: dict[str, Outcome] = {}

    def run(**options: Any) -> Outcome:
        strategy = options.get("strategy", "gemini")
        stages = {"gemini": 3, **{f"gemini_stage_{stage}": stage for stage in (1, 2, 3)}}
        arguments = {"stage": stages[strategy]} if isinstance(strategy, str) else dict(strategy)
        options = {**options, "strategy": {**arguments, "checkpoint_every": 0}}
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            job = Job(forks, tmp_path_factory.mktemp("undisturbed"), runtime, **options)
            known[key] = job.run()
            assert known[key].ended, known[key].output
        return known[key]

    return run
