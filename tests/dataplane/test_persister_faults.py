"""The persistent tier on real disks in trouble: full, read-only, slow, gone; and a crash at every file operation.

Whatever happens: the previous checkpoint is there and loads, training goes on, and the user is told once, and again
when it works again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import persister as module
from lightning_gemini.dataplane.persistent_directory import checkpoints, probe, resumable
from lightning_gemini.dataplane.persister import Persister
from lightning_gemini.errors import PersistError
from tests.dataplane.test_persister import (
    WORLD,
    assert_loads,
    buffer_with,
    files_of,
    latest,
    persist,
    persister,
    steps_in,
)

ROOT = Path(__file__).parents[2]
Log = pytest.LogCaptureFixture


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, so small that it holds two checkpoints of two ranks but not three."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=48k", "gemini-test", str(path))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no mounts here: {error.stderr.decode().strip()}")
    yield path
    while path.is_mount():
        subprocess.run(["umount", "-l", str(path)], check=True)


class Ranks:
    """Both ranks, which live on while the disk does what it wants."""

    def __init__(self, directory: Path, files: Callable[..., dict[str, Any]] = files_of) -> None:
        self.ranks = [Persister(directory, rank, WORLD, files) for rank in range(WORLD)]

    def persist(self, step: int) -> None:
        """Both at once, each in its thread."""
        buffers = [buffer_with(rank, step) for rank in range(WORLD)]
        for rank, buffer in zip(self.ranks, buffers, strict=True):
            rank.start(buffer, VersionId(1, step))
        for rank in self.ranks:
            rank.close()
            assert not rank.busy
        for buffer in buffers:
            buffer.close()


def said(caplog: Log, words: str) -> int:
    return sum(words in record.message for record in caplog.records)


# -- full --------------------------------------------------------------------------------------------------------------


def test_a_full_disk(disk: Path, caplog: Log) -> None:
    ranks = Ranks(disk)
    ranks.persist(10)
    ranks.persist(20)
    assert (steps_in(disk), caplog.records) == ([20, 10], [])
    for step in range(30, 80, 10):
        ranks.persist(step)
        assert latest(disk) == "global_step20"
        assert_loads(disk / "global_step20", 20)
        assert_loads(disk / "global_step10", 10)
    assert said(caplog, "No space left on device") >= 1
    assert said(caplog, "was not persisted") <= WORLD, "each rank says it once"
    failures = [rank.failures for rank in ranks.ranks]
    assert failures[0] == 5
    mount("-o", "remount,size=1m", str(disk))
    ranks.persist(80)
    assert said(caplog, "version 80: rank 0 persists again, after 5 failures") == 1
    assert steps_in(disk) == [80, 20]
    assert_loads(disk / "global_step80", 80)
    assert not list(disk.glob(".global_step*")), "the room that attempts took is free again"
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * 2**21)
    said_before = said(caplog, "was not persisted")
    ranks.persist(90)
    assert said(caplog, "was not persisted") > said_before, "it is news again"
    assert latest(disk) == "global_step80"


def test_what_an_attempt_left_on_a_full_disk_goes_before_the_next_one(tmp_path: Path) -> None:
    persist(tmp_path, 10)
    left = tmp_path / ".global_step20.1.tmp"
    left.mkdir()
    (left / "part").write_bytes(b"x" * 100)
    seen: list[bool] = []

    def files(*state: dict[str, Any]) -> dict[str, Any]:
        seen.append(left.exists())
        return files_of(*state)

    buffer = buffer_with(0, 30)
    Persister(tmp_path, 0, 1, files)._run(buffer, VersionId(1, 30))
    buffer.close()
    assert seen == [False]
    assert latest(tmp_path) == "global_step30"


def test_nobody_waits_for_a_rank_that_could_not_write(tmp_path: Path, caplog: Log) -> None:
    assert module._OTHERS_TIMEOUT_S > 60  # more than this test may take

    def files(stable: dict[str, Any], volatile: dict[str, Any]) -> dict[str, Any]:
        if volatile["rank"] == 1 and volatile["counters"]["global_steps"] == 20:
            raise OSError(28, "No space left on device")
        return files_of(stable, volatile)

    ranks = Ranks(tmp_path, files)
    for step in (10, 20, 30):
        ranks.persist(step)
    assert said(caplog, "ranks [1] could not write their files") == 1
    assert said(caplog, "No space left on device") == 1
    assert said(caplog, "persists again, after 1 failures") == WORLD
    assert steps_in(tmp_path) == [30, 10]


def test_a_full_disk_does_not_cut_the_scripts_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "zero_to_fp32.py"
    script.write_text("print('for people')")
    directory = tmp_path / "persistent"
    one = persister(directory, 0, 1, (script,))
    buffer = buffer_with(0, 10)
    one._run(buffer, VersionId(1, 10))
    script.write_text("print('of a newer DeepSpeed')")
    replace_text = module._replace_text

    def full(path: Path, text: str) -> None:
        path.with_name(f".{path.name}.tmp").write_text(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_replace_text", full)
    one._run(buffer, VersionId(1, 10))
    assert (directory / script.name).read_text() == "print('for people')"
    monkeypatch.setattr(module, "_replace_text", replace_text)
    one._run(buffer, VersionId(1, 10))
    assert (directory / script.name).read_text() == script.read_text()
    buffer.close()


# -- read-only and gone ------------------------------------------------------------------------------------------------


def test_a_disk_that_turns_read_only(disk: Path, caplog: Log) -> None:
    ranks = Ranks(disk)
    ranks.persist(10)
    mount("-o", "remount,ro", str(disk))
    ranks.persist(20)
    ranks.persist(30)
    assert said(caplog, "Read-only file system") >= 1
    assert resumable(disk) == ["global_step10"]
    assert_loads(disk / "global_step10", 10)
    with pytest.raises(PersistError, match=r"cannot be written \(Read-only file system\): make it writable"):
        probe(disk)
    ranks.ranks[0].discard_abandoned()
    ranks.ranks[0].mark_finished()
    assert said(caplog, "could not be marked as finished") == 1
    mount("-o", "remount,rw", str(disk))
    ranks.persist(40)
    assert steps_in(disk) == [40, 10]
    assert said(caplog, "persists again, after 2 failures") == WORLD


def test_a_directory_that_is_removed_in_mid_write(tmp_path: Path, caplog: Log) -> None:
    directory = tmp_path / "persistent"

    def files(stable: dict[str, Any], volatile: dict[str, Any]) -> dict[str, Any]:
        if volatile["counters"]["global_steps"] == 20:
            shutil.rmtree(directory, ignore_errors=True)
        return files_of(stable, volatile)

    ranks = Ranks(directory, files)
    for step in (10, 20, 30):
        ranks.persist(step)
    assert said(caplog, "version 20 was not persisted") == WORLD
    assert checkpoints(directory) == [(30, directory / "global_step30")]
    assert_loads(directory / "global_step30", 30)


def test_a_disk_that_is_unmounted_in_mid_write_and_comes_back(disk: Path, tmp_path: Path, caplog: Log) -> None:
    place = tmp_path / "place"
    place.mkdir()
    mount("--bind", str(disk), str(place))
    directory = place / "persistent"

    def files(stable: dict[str, Any], volatile: dict[str, Any]) -> dict[str, Any]:
        if volatile["counters"]["global_steps"] == 20 and volatile["rank"] == 0:
            subprocess.run(["umount", "-l", str(place)], check=True)
        return files_of(stable, volatile)

    one = Persister(directory, 0, 1, files)
    buffers = [buffer_with(0, step) for step in (10, 20, 30)]
    one._run(buffers[0], VersionId(1, 10))
    one._run(buffers[1], VersionId(1, 20))
    assert said(caplog, "version 20 was not persisted") == 1
    assert not directory.exists()
    assert resumable(directory) == []
    mount("--bind", str(disk), str(place))
    try:
        assert resumable(directory) == ["global_step10"]
        one._run(buffers[2], VersionId(1, 30))
        assert resumable(directory) == ["global_step30", "global_step10"]
        assert not list(directory.glob(".global_step*")), "what was begun before is removed"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        for buffer in buffers:
            buffer.close()


# -- slow, and killed --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw on a slow disk, and what others left that were killed there."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the library that is preloaded")
    place = tmp_path_factory.mktemp("trouble")
    library = place / "disk_trouble.so"
    source = Path(__file__).with_name("disk_trouble.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    command = [sys.executable, "-m", "tests.dataplane.troubled_disk", str(place)]
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "stderr": done.stderr}


def test_a_crash_at_any_operation_of_the_c_library_leaves_a_whole_checkpoint(troubled: dict[str, Any]) -> None:
    assert troubled["crashes"] > 30
    assert troubled["latest"] == sorted(troubled["latest"]), "once the new one is named, it stays"
    assert set(troubled["latest"]) == {"global_step20", "global_step30"}


def test_a_slow_disk_holds_up_neither_training_nor_its_end(troubled: dict[str, Any]) -> None:
    assert troubled["operations"] > 15
    assert troubled["took_s"] >= 0.02 * troubled["operations"]
    assert troubled["start_s"] < troubled["took_s"] / 2
    assert troubled["threads"] == []
    assert troubled["found"] == [10]
    assert "version 20 was not persisted" in troubled["stderr"]
    assert "the run ended first" in troubled["stderr"]
