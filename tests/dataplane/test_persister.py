"""The persistent tier: whatever breaks, and wherever, ``latest`` names a whole checkpoint and the one before stays."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import persister as module
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.persistent_directory import (
    FINISHED,
    checkpoints,
    is_finished,
    load,
    probe,
    rank_file,
    resumable,
)
from lightning_gemini.dataplane.persister import Persister
from lightning_gemini.dataplane.shard import lay_out
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.errors import PersistError
from tests.dataplane.encoding import encode
from tests.dataplane.waiting import wait_until

WORLD = 2


def optimizer_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_optim_states.pt"


def state_of(rank: int, step: int, mark: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    constant = {"optimizer_file": optimizer_file(rank), "model_file": "model_states.pt"}
    stable = {
        "constant": shard.pack(constant),
        "optimizer": {"exp_avg": torch.full((50,), float(1000 * step + rank)), "mark": mark},
        "parameters": {"weight": torch.full((4,), float(step))},
    }
    return stable, {"buffers": {"mean": torch.zeros(1)}, "counters": {"global_steps": step}, "rank": rank}


def files_of(stable: dict[str, Any], volatile: dict[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {optimizer_file(volatile["rank"]): {"optimizer_state_dict": stable["optimizer"]}}
    if volatile["rank"] == 0:
        files["model_states.pt"] = {
            "module": {**stable["parameters"], **volatile["buffers"]},
            "frozen_param_fragments": None,
        }
    return files


def buffer_with(rank: int, step: int, mark: str = "") -> Buffer:
    data = encode(lay_out(*state_of(rank, step, mark)))
    buffer = Buffer.create(rank, len(data))
    buffer.begin(VersionId(1, step), len(data))
    buffer.data[: len(data)] = data
    buffer.seal(len(data))
    buffer.complete()
    return buffer


def persister(directory: Path, rank: int, world: int = WORLD, scripts: tuple[Path, ...] = (), **more: Any) -> Persister:
    return Persister(directory, rank, world, files_of, scripts, **more)


def write(directory: Path, rank: int, step: int, world: int = WORLD) -> None:
    """Persist one rank's part, as its thread does, and free the buffer."""
    buffer = buffer_with(rank, step)
    persister(directory, rank, world)._run(buffer, VersionId(1, step))
    buffer.close()


def persist(directory: Path, *steps: int) -> None:
    for step in steps:
        for rank in reversed(range(WORLD)):  # rank 0 finishes
            write(directory, rank, step)


def steps_in(directory: Path) -> list[int]:
    return [step for step, _ in checkpoints(directory)]


def latest(directory: Path) -> str:
    return (directory / "latest").read_text()


def assert_loads(path: Path, step: int) -> None:
    for rank in range(WORLD):
        stable, volatile, world = load(path, rank, partitioned=False)
        assert world == WORLD
        assert bool((stable["optimizer"]["exp_avg"] == 1000 * step + rank).all())
        assert volatile["counters"]["global_steps"] == step
        assert (stable["parameters"] is None) == (rank > 0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OTHERS_TIMEOUT_S", 0.15)
    monkeypatch.setattr(module, "_POLL_S", 0.005)


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_in_the_background_and_read_back(tmp_path: Path) -> None:
    directory = tmp_path / "persistent"
    script = tmp_path / "zero_to_fp32.py"
    script.write_text("print('for people')")
    both = [persister(directory, rank, scripts=(script,)) for rank in range(WORLD)]
    buffers = [buffer_with(rank, 12) for rank in range(WORLD)]
    for one, buffer in zip(both, buffers, strict=True):
        one.start(buffer, VersionId(1, 12))
    for one in both:
        one.close()
        assert (one.busy, one.last) == (False, 12)
    assert latest(directory) == "global_step12"
    assert checkpoints(directory) == [(12, directory / "global_step12")]
    assert sorted(path.name for path in directory.iterdir()) == ["global_step12", "latest", "zero_to_fp32.py"]
    assert_loads(directory / "global_step12", 12)
    for buffer in buffers:
        buffer.close()


def test_every_rank_of_a_partitioned_model_reads_the_weights(tmp_path: Path) -> None:
    persist(tmp_path, 3)
    stable, _, _ = load(tmp_path / "global_step3", 1, partitioned=True)
    assert list(stable["parameters"]) == ["weight"]  # buffers come with the rest of the state


def test_a_checkpoint_is_announced_once_it_is_the_latest_and_by_rank_0_alone(tmp_path: Path) -> None:
    told: list[tuple[int, str, int, str]] = []
    for rank in reversed(range(WORLD)):

        def announce(event: str, *, version: int, seconds: float, rank: int = rank) -> None:
            told.append((rank, event, version, latest(tmp_path)))

        buffer = buffer_with(rank, 5)
        persister(tmp_path, rank, announce=announce)._run(buffer, VersionId(1, 5))
        buffer.close()
    assert told == [(0, "persisted", 5, "global_step5")]


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    persist(tmp_path, 1, 2, 3, 4)
    assert steps_in(tmp_path) == [4, 3]
    for step, path in checkpoints(tmp_path):
        assert_loads(path, step)


def test_a_checkpoint_waits_a_moment_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OTHERS_TIMEOUT_S", 60.0)
    monkeypatch.setattr(module, "_PREVIOUS_TIMEOUT_S", 20.0)
    one = persister(tmp_path, 0)
    buffers = [buffer_with(0, 1), buffer_with(0, 2)]
    one.start(buffers[0], VersionId(1, 1))  # waits for rank 1
    one.start(buffers[1], VersionId(1, 2))
    assert one.busy
    write(tmp_path, 1, 1)
    wait_until(lambda: steps_in(tmp_path) == [1], "the first one")
    write(tmp_path, 1, 2)
    one.close()
    assert steps_in(tmp_path) == [2, 1]
    for buffer in buffers:
        buffer.close()


def test_only_one_checkpoint_is_written_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_OTHERS_TIMEOUT_S", 60.0)
    monkeypatch.setattr(module, "_PREVIOUS_TIMEOUT_S", 0.05)
    one = persister(tmp_path, 0)
    buffers = [buffer_with(0, 1), buffer_with(0, 2)]
    one.start(buffers[0], VersionId(1, 1))  # waits for rank 1
    first = one._thread
    one.start(buffers[1], VersionId(1, 2))
    one.close()
    assert "version 2 was not persisted" in caplog.text
    assert "still being written" in caplog.text
    write(tmp_path, 1, 1)
    assert first is not None
    first.join(20.0)
    assert steps_in(tmp_path) == [1]
    for buffer in buffers:
        buffer.close()


def test_a_step_that_was_persisted_before_is_written_beside_it(tmp_path: Path) -> None:
    """A job that begins anew in the same directory: the old checkpoint stays until the new one is in place."""
    persist(tmp_path, 5, 5, 5)
    assert [path.name for _, path in checkpoints(tmp_path)] == ["global_step5.2", "global_step5.1"]
    assert latest(tmp_path) == "global_step5.2"
    for step, path in checkpoints(tmp_path):
        assert_loads(path, step)


def test_what_training_went_back_behind_goes_first(tmp_path: Path) -> None:
    persist(tmp_path, 100, 200, 50)
    assert steps_in(tmp_path) == [50, 200]
    persist(tmp_path, 60)
    assert steps_in(tmp_path) == [60, 50]


# -- crashes -----------------------------------------------------------------------------------------------------------

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.copyfile"}
MOST_POINTS = 300
CRASHED, RAISED, ALL_DONE, BROKEN = range(4)


def until(point: int, directory: Path, strike: Callable[[], None]) -> Callable[..., None]:
    """Calls ``strike`` before file operation number ``point`` in this directory."""
    left = point

    def count(path: object) -> None:
        nonlocal left
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(directory)):
            if left == 0:
                strike()
            left -= 1

    return count


def in_child(action: Callable[[], int]) -> int:
    """Run in a forked process, which may be killed without harm."""
    pid = os.fork()
    if pid == 0:
        outcome = BROKEN
        try:
            outcome = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(outcome)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return CRASHED
    return os.WEXITSTATUS(status)


def watch(count: Callable[[object], None]) -> None:
    """Count every file operation of this process, and what has no audit event: fsync."""
    sys.addaudithook(lambda event, arguments: count(arguments[0]) if event in OPERATIONS else None)
    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def counted_open(path: Path, mode: str) -> Any:
        stream = open(path, mode)  # noqa: SIM115 - the caller closes it
        count(path)  # opened, and perhaps emptied, but nothing is written yet
        return stream

    os.fsync = counted_fsync  # type: ignore[assignment]
    module.open = counted_open  # type: ignore[attr-defined]


def assert_consistent(directory: Path, step: int) -> None:
    """After an attempt at ``step`` over 10 and 20: ``latest`` loads, and so does the one before it."""
    named = latest(directory)
    assert named in ("global_step20", f"global_step{step}")
    found = {path.name: at for at, path in checkpoints(directory)}
    assert next(iter(found)) == named
    for name in {named, "global_step20"}:
        assert_loads(directory / name, found[name])


@pytest.fixture
def before(tmp_path: Path) -> Path:
    directory = tmp_path / "before"
    persist(directory, 10, 20)
    return directory


@pytest.fixture
def attempts(before: Path, tmp_path: Path) -> Attempts:
    """Makes a fresh copy of the directory for each point."""

    def make() -> Iterator[Path]:
        for point in range(MOST_POINTS):
            directory = tmp_path / f"at{point}"
            shutil.copytree(before, directory)
            yield directory
            shutil.rmtree(directory)
        raise AssertionError("the attempt never came to its end")

    return make


Attempts = Callable[[], Iterator[Path]]


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_crash_between_any_two_file_operations_leaves_two_checkpoints(attempts: Attempts, rank: int) -> None:
    buffers = [buffer_with(one, 30) for one in range(WORLD)]

    def attempt(directory: Path, point: int) -> int:
        watch(until(point, directory, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        persister(directory, rank)._run(buffers[rank], VersionId(1, 30))
        return ALL_DONE

    crashes = 0
    for point, directory in enumerate(attempts()):
        if rank == 0:
            write(directory, 1, 30)
        outcome = in_child(lambda point=point, directory=directory: attempt(directory, point))  # type: ignore[misc]
        if rank == 1:
            write(directory, 0, 30)  # waits in vain, unless rank 1 came to its end
        assert_consistent(directory, 30)
        if outcome == ALL_DONE:
            break
        assert outcome == CRASHED
        crashes += 1
        restart_and_persist(directory)
    assert crashes > (15 if rank == 0 else 5)
    assert latest(directory) == "global_step30"
    for buffer in buffers:
        buffer.close()


def restart_and_persist(directory: Path) -> None:
    """The job starts again, and its next checkpoint succeeds, over whatever the crash left."""
    persister(directory, 0).discard_abandoned()
    assert not [path for path in directory.iterdir() if path.name.endswith(".tmp") and path.is_dir()]
    persist(directory, 40)
    assert latest(directory) == "global_step40"
    assert len(checkpoints(directory)) == 2
    for step, path in checkpoints(directory):
        assert_loads(path, step)


def test_an_error_at_any_file_operation_leaves_two_checkpoints_and_training_goes_on(attempts: Attempts) -> None:
    """A full disk, at every operation in turn; the same process succeeds the next time."""
    buffers = [buffer_with(0, 30), buffer_with(0, 40)]

    def attempt(directory: Path, point: int) -> int:
        armed = True
        failed = False

        def fail() -> None:
            nonlocal failed
            failed = True
            raise OSError(errno.ENOSPC, "No space left on device")

        count = until(point, directory, fail)
        watch(lambda path: count(path) if armed else None)
        one = persister(directory, 0)
        one._run(buffers[0], VersionId(1, 30))
        armed = False
        assert_consistent(directory, 30)
        if not failed:
            return ALL_DONE
        write(directory, 1, 40)
        one._run(buffers[1], VersionId(1, 40))
        assert latest(directory) == "global_step40"
        return RAISED

    errors = 0
    for point, directory in enumerate(attempts()):
        write(directory, 1, 30)
        outcome = in_child(lambda point=point, directory=directory: attempt(directory, point))  # type: ignore[misc]
        if outcome == ALL_DONE:
            break
        assert outcome == RAISED
        errors += 1
        assert_loads(directory / "global_step40", 40)
    assert errors > 15
    for buffer in buffers:
        buffer.close()


def test_a_full_disk_gives_back_what_the_attempt_took(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        write(before, 0, 30)
    assert not list(before.glob(".global_step30*"))


# -- ranks that do not come --------------------------------------------------------------------------------------------


def test_a_rank_that_writes_nothing_is_named_and_nothing_is_finished(
    before: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(before, 0, 30)
    assert "ranks [1] wrote nothing" in caplog.text
    assert "what is there stays valid, training goes on" in caplog.text
    assert_consistent(before, 30)
    assert latest(before) == "global_step20"
    assert not list(before.glob(".global_step30*"))


def test_files_of_an_earlier_run_are_not_mixed_in(tmp_path: Path) -> None:
    """The same step and the same generation again, after everything was lost in the middle of it."""
    old = buffer_with(1, 30, mark="old")
    persister(tmp_path, 1)._run(old, VersionId(1, 30))
    old.close()
    for rank in range(WORLD):
        persister(tmp_path, rank).discard_abandoned()
    zero, one = buffer_with(0, 30, mark="new"), buffer_with(1, 30, mark="new")
    finishing = persister(tmp_path, 0)
    finishing.start(zero, VersionId(1, 30))
    wait_until(lambda: list(tmp_path.glob(f".global_step30*/{rank_file(0)}")), "rank 0 has written its part")
    assert not checkpoints(tmp_path)  # it waits for the new file of rank 1
    persister(tmp_path, 1)._run(one, VersionId(1, 30))
    finishing.close()
    marks = {load(tmp_path / "global_step30", rank, partitioned=False)[0]["optimizer"]["mark"] for rank in (0, 1)}
    assert marks == {"new"}
    zero.close()
    one.close()


# -- what cannot be persisted ------------------------------------------------------------------------------------------


def test_a_version_that_was_overwritten_is_not_persisted(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = buffer_with(0, 30)
    persister(before, 0)._run(buffer, VersionId(1, 28))
    buffer.close()
    assert "version 28 was overwritten while it was being copied" in caplog.text
    assert steps_in(before) == [20, 10]


def test_a_corrupt_version_is_not_persisted(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = buffer_with(0, 30)
    buffer.data[100] ^= 1
    persister(before, 0)._run(buffer, VersionId(1, 30))
    buffer.close()
    assert "chunk 0 is corrupt" in caplog.text
    assert steps_in(before) == [20, 10]


@pytest.mark.parametrize("error", [KeyError("optimizer_file"), MemoryError(), TypeError("cannot pickle a lock")])
def test_whatever_goes_wrong_is_reported_and_training_goes_on(
    before: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise error

    one = Persister(before, 0, WORLD, fail)
    buffer = buffer_with(0, 30)
    one.start(buffer, VersionId(1, 30))
    one.close()
    buffer.close()
    assert "version 30 was not persisted" in caplog.text
    assert (one.busy, one.last, steps_in(before)) == (False, None, [20, 10])


def test_a_disk_that_stays_full_is_reported_once_and_then_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    one = persister(tmp_path / "file" / "below", 0)
    buffer = buffer_with(0, 30)
    for _ in range(99):
        one._run(buffer, VersionId(1, 30))
    assert len(caplog.records) == 1
    one._run(buffer, VersionId(1, 30))
    assert "failure 100" in caplog.records[-1].message
    buffer.close()


def test_a_job_that_ends_well_does_not_fail_at_the_mark(
    before: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", fail)
    persister(before, 0).mark_finished()
    assert "could not be marked as finished" in caplog.text


def test_a_directory_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PersistError, match=r"persist_dir .*/file/below cannot be written \(Not a directory\): make it"):
        probe(tmp_path / "file" / "below")
    good = tmp_path / "new" / "directory"
    probe(good)
    assert list(good.iterdir()) == []


# -- reading what is damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [rank_file(0), optimizer_file(0), "model_states.pt"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_a_damaged_checkpoint_is_an_error_of_this_package(tmp_path: Path, name: str, damage: str) -> None:
    persist(tmp_path, 3)
    path = tmp_path / "global_step3" / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": b"not a checkpoint"}[damage])
    with pytest.raises(PersistError, match="global_step3 cannot be read"):
        load(tmp_path / "global_step3", 0, partitioned=False)


def test_a_directory_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none") == []
    (tmp_path / "global_stepX").mkdir()
    (tmp_path / ".global_step3.1.tmp").mkdir()
    (tmp_path / "latest").write_text("")
    assert (checkpoints(tmp_path), resumable(tmp_path), is_finished(tmp_path)) == ([], [], False)
    persister(tmp_path, 0).mark_finished()
    assert not (tmp_path / FINISHED).exists()


def test_a_latest_that_names_nothing_there_does_not_hide_the_rest(before: Path) -> None:
    (before / "latest").write_text("global_step99")
    assert steps_in(before) == [20, 10]
    (before / "latest").unlink()
    assert steps_in(before) == [20, 10]


# -- finished jobs -----------------------------------------------------------------------------------------------------


def test_a_finished_job_is_not_resumed_by_the_next_one(before: Path) -> None:
    assert resumable(before) == ["global_step20", "global_step10"]
    persister(before, 1).mark_finished()
    assert not is_finished(before)  # rank 0 says it
    persister(before, 0).mark_finished()
    assert is_finished(before)
    assert resumable(before) == []
    assert_loads(before / "global_step20", 20)  # but anybody may load it


def test_a_new_job_in_the_directory_of_a_finished_one_is_resumed_from_its_own_checkpoints(before: Path) -> None:
    persister(before, 0).mark_finished()
    persist(before, 5)
    assert not is_finished(before)
    assert resumable(before)[0] == "global_step5"
    assert "global_step20" not in resumable(before)
    persist(before, 6, 7)
    assert resumable(before) == ["global_step7", "global_step6"]
    assert_loads(before / "global_step20", 20)  # the finished job's result is kept


def test_a_job_that_dies_at_its_first_checkpoint_leaves_the_finished_one_finished(before: Path) -> None:
    persister(before, 0).mark_finished()
    write(before, 0, 5)  # rank 1 never comes
    assert is_finished(before)
    assert resumable(before) == []


def test_closing_waits_for_a_checkpoint_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_OTHERS_TIMEOUT_S", 60.0)
    one = persister(tmp_path, 0)
    buffer = buffer_with(0, 1)
    one.start(buffer, VersionId(1, 1))
    one.close(timeout_s=0.05)
    assert not one.busy
    assert "version 1 was not persisted" in caplog.text
    assert "the run ended first" in caplog.text
    assert list(tmp_path.iterdir()) == []
    buffer.close()


def test_every_file_is_on_the_disk_before_anything_refers_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure leaves: bytes, then their names, then the directory's name, then ``latest``."""
    write(tmp_path, 1, 30)
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_rename(self: Path, target: Path) -> Path:
        done.append(("rename", str(self)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    write(tmp_path, 0, 30)
    work = str(tmp_path / ".global_step30.1.tmp")
    parts = [path for kind, path in done if kind == "rename" and path.endswith(".part")]
    assert len(parts) == 3
    for part in parts:
        assert done.index(("sync", part)) < done.index(("rename", part)) < done.index(("sync", work))
    order = [("sync", work), ("rename", work), ("sync", str(tmp_path))]
    order += [("sync", str(tmp_path / ".latest.tmp")), ("rename", str(tmp_path / ".latest.tmp"))]
    places = [done.index(entry) for entry in order]
    assert places == sorted(places)
    assert done[-1] == ("sync", str(tmp_path))
