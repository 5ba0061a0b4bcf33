"""When the persistent tier is written, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_gemini.callbacks import persistent_tier
from lightning_gemini.callbacks.peer_memory import RestoredShard
from lightning_gemini.callbacks.persistent_tier import PersistentTier
from lightning_gemini.callbacks.ranks import RankIdentity
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.controlplane.events import EventLog
from lightning_gemini.core.recovery import Tier, VersionId
from lightning_gemini.dataplane import persister
from tests.dataplane.test_persister import buffer_with, files_of
from tests.dataplane.waiting import wait_until

HOUR_S = 3600.0


class Alone:
    """The ranks of a job with one rank."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_first(self, value: Any) -> Any:
        return value


class Clock:
    now = 1_700_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    for module in (persistent_tier, persister):
        real = module.time  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(real), "time": lambda: made.now}))
    monkeypatch.setattr(persistent_tier, "_deepspeed_files", files_of)
    return made


def tier(directory: Path, rank: int = 0) -> PersistentTier:
    config = CheckpointConfig(persist_dir=directory, persist_every_s=HOUR_S)
    identity, group = RankIdentity(rank, rank, 0, 1, 1), Alone()
    return PersistentTier(config, identity, group, "", probe=True, events=EventLog(None))  # type: ignore[arg-type]


def found(mark: Any, where: Tier = Tier.LOCAL_MEMORY) -> RestoredShard:
    return RestoredShard(7, VersionId(1, 7), where, {}, {"persisted": mark}, 0.0)


def due_after_s(one: PersistentTier, clock: Clock) -> float:
    began = clock.now
    while not one.wanted:
        clock.now += 60.0
    return clock.now - began


def test_the_interval_begins_with_training_and_with_every_checkpoint(clock: Clock, tmp_path: Path) -> None:
    one = tier(tmp_path)
    one.begin(None)
    assert due_after_s(one, clock) == HOUR_S
    one.write(None, None)
    assert due_after_s(one, clock) == HOUR_S


def test_it_goes_on_where_training_goes_on_from_memory(clock: Clock, tmp_path: Path) -> None:
    one, other = tier(tmp_path), tier(tmp_path)
    one.begin(None)
    clock.now += 0.75 * HOUR_S
    other.begin(found(one.mark))
    assert other.mark == one.mark
    assert due_after_s(other, clock) == pytest.approx(0.25 * HOUR_S)


@pytest.mark.parametrize("mark", [None, {"directory": "/elsewhere", "at": 0.0}], ids=["none", "elsewhere"])
def test_it_begins_anew_where_nothing_is_known_of_this_directory(clock: Clock, tmp_path: Path, mark: Any) -> None:
    one = tier(tmp_path)
    one.begin(found(mark))
    assert due_after_s(one, clock) == HOUR_S


def test_it_begins_anew_after_a_restore_from_disk_and_with_a_clock_that_is_behind(clock: Clock, tmp_path: Path) -> None:
    one = tier(tmp_path)
    one.begin(found({"directory": str(tmp_path), "at": 0.0}, Tier.PERSISTENT))
    assert due_after_s(one, clock) == HOUR_S
    one.begin(found({"directory": str(tmp_path), "at": clock.now + 1e6}))
    assert due_after_s(one, clock) == HOUR_S


def test_a_checkpoint_counts_for_who_recovers_only_once_it_is_complete(clock: Clock, tmp_path: Path) -> None:
    one = tier(tmp_path)
    one.begin(None)
    began = clock.now
    clock.now += HOUR_S
    assert one.wanted
    one.write(None, None)  # it is begun, and nothing comes of it
    assert not one.wanted
    assert one.mark["at"] == began
    buffer = buffer_with(0, 12)
    one.write(buffer, VersionId(1, 12))
    wait_until(lambda: (tmp_path / "latest").exists(), "it is complete")
    one.close(finished=False)
    assert one.mark == {"directory": str(tmp_path), "at": clock.now}
    buffer.close()


def test_rank_0_speaks_for_all(clock: Clock, tmp_path: Path) -> None:
    one = tier(tmp_path, rank=1)
    one.begin(None)
    clock.now += 2 * HOUR_S
    assert not one.wanted
