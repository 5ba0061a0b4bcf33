"""A version that memory loses on the way to its commit: given up by all ranks together, instead of waited for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_gemini.callbacks.publisher import VersionPublisher
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.header import Word
from lightning_gemini.dataplane.slab import Slab
from lightning_gemini.dataplane.snapshot import Snapshotter


class Alone:
    """The collectives of a job with one rank."""

    def minimum(self, values: list[int]) -> list[int]:
        return values


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab.create(0, 100_000)
    yield made
    made.close()


@pytest.fixture
def publisher(slab: Slab) -> Iterator[VersionPublisher]:
    snapshotter = Snapshotter(lambda: None, torch.device("cpu"))
    snapshotter.start()
    fields: dict[str, Any] = {"replicated": False, "commit_wait_s": 10.0, "resumed": None, "declined": None}
    yield VersionPublisher(slab, snapshotter, Alone(), 1, **fields, record=lambda costs: None)  # type: ignore[arg-type]
    snapshotter.close()


def publish(publisher: VersionPublisher, step: int) -> None:
    publisher.publish(step, shard.Planner().draft(lambda: {"weights": torch.ones(1000)}, {"step": step}), 0.0)
    assert publisher._snapshot is not None
    assert publisher._snapshot.wait(30.0)


def test_a_committed_version_is_noted_in_memory(publisher: VersionPublisher, slab: Slab) -> None:
    """Replicators tell holders what they must keep; whoever comes later finds it there, too."""
    for step in (1, 2, 3):
        publish(publisher, step)
        publisher.settle()
        assert publisher.committed == slab.committed == VersionId(1, step)


def test_a_version_whose_header_is_damaged_is_given_up_and_the_next_one_commits(
    publisher: VersionPublisher, slab: Slab, caplog: pytest.LogCaptureFixture
) -> None:
    publish(publisher, 1)
    publisher.settle()
    publish(publisher, 2)
    damaged = slab.holding(VersionId(1, 2))
    assert damaged is not None
    damaged._words[Word.GENERATION] ^= 1
    publisher.settle()
    assert publisher.newest == publisher.committed == VersionId(1, 1)
    assert "version 2 failed: this rank's copy was damaged in memory" in caplog.text
    assert publisher.ready(3)
    publish(publisher, 3)
    publisher.settle()
    assert publisher.committed == VersionId(1, 3)
    assert [buffer.id for buffer in slab.complete()] == [VersionId(1, 3), VersionId(1, 1)]
