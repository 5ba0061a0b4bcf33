"""The persistent tier: ordinary DeepSpeed checkpoint directories, written from memory behind training's back.

A checkpoint is written to a temporary name, every file is fsynced, the directory is renamed, and ``latest`` is replaced
last, so that a crash between any two operations leaves the previous checkpoint valid.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.persistent_directory import (
    FINISHED,
    checkpoints,
    is_result,
    latest_checkpoint,
    rank_file,
)
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.errors import IntegrityError, PersistError

log = logging.getLogger(__name__)

KEEP = 2
_OTHERS_TIMEOUT_S = 600.0
_POLL_S = 0.05
_PREVIOUS_TIMEOUT_S = 1.0
_ABORT_TIMEOUT_S = 5.0

FilesOf = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def _failure_mark(rank: int) -> str:
    return f"gemini_rank_{rank:05d}.failed"


class Persister:
    """Writes committed versions of one rank to a directory that all ranks share.

    Args:
        directory: The DeepSpeed ``save_dir``.
        rank: This global rank; rank 0 finishes the checkpoint once every rank has written its files.
        world_size: Number of ranks.
        files_of: Turns a decoded shard into DeepSpeed's files, name to content.
        scripts: Files copied beside the checkpoints, for people (``zero_to_fp32.py``).
        announce: Told on rank 0, by name and fields, what happened: ``persisted``.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        files_of: FilesOf,
        scripts: tuple[Path, ...] = (),
        announce: Callable[..., object] = lambda event, **fields: None,
    ) -> None:
        self.directory, self._announce = directory, announce
        self._rank, self._world_size, self._files_of, self._scripts = rank, world_size, files_of, scripts
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self.last: int | None = None
        self.last_at: float | None = None
        self.failures = 0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, buffer: Buffer, version: VersionId) -> None:
        """Write ``version`` in the background; problems are logged, training goes on."""
        arguments = (buffer, version, self._thread)
        self._thread = threading.Thread(target=self._run, args=arguments, name="gemini-persist", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 30.0) -> None:
        """Give a checkpoint that is being written a last chance to finish, then give it up."""
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self.busy:  # a thread that still writes when the interpreter ends takes the process down with it
            self._ending.set()
            self._thread.join(_ABORT_TIMEOUT_S)

    def discard_abandoned(self, before: int | None = None) -> None:
        """Remove what earlier attempts left: all of them before training, later those at steps up to ``before``."""
        if self._rank != 0:
            return
        with contextlib.suppress(OSError):
            for abandoned in self.directory.glob(".global_step*.tmp"):
                # Other ranks may be writing a newer version already.
                if before is None or int(abandoned.name.removeprefix(".global_step").split(".")[0]) <= before:
                    shutil.rmtree(abandoned, ignore_errors=True)

    def mark_finished(self) -> None:
        """The job ended well: its last checkpoint is a result now, and no new job resumes from it by itself."""
        # The mark is in the checkpoint, so that it goes to no other when `latest` is replaced.
        latest = latest_checkpoint(self.directory)
        try:
            if self._rank == 0 and latest is not None and latest.is_dir():
                (latest / FINISHED).touch()
        except OSError as error:
            log.warning("%s could not be marked as finished (%s): remove it before another job", latest, error)

    def _run(self, buffer: Buffer, version: VersionId, previous: threading.Thread | None = None) -> None:
        try:
            began = time.monotonic()
            stable, volatile = self._read(buffer, version)
            _wait_for(previous)
            self._write(version, stable, volatile)
            self.last, self.last_at = version.version, time.time()
            if self.failures:
                log.warning("version %d: rank %d persists again, after %d failures", *self._recovered(version))
            if self._rank == 0:
                seconds = time.monotonic() - began
                log.info("version %d persisted in %.1f s", version.version, seconds)
                self._announce("persisted", version=version.version, seconds=seconds)
        except Exception as error:  # whatever it was, training must go on
            if self._ending.is_set():
                log.warning("version %d was not persisted to %s: the run ended first", version.version, self.directory)
                return
            self.failures += 1
            if self.failures == 1 or self.failures % 100 == 0:  # once, then counted
                log.warning(
                    "version %d was not persisted to %s (%s; failure %d); what is there stays valid, training goes on, "
                    "the next attempt follows",
                    version.version,
                    self.directory,
                    error,
                    self.failures,
                )

    def _recovered(self, version: VersionId) -> tuple[int, int, int]:
        failures, self.failures = self.failures, 0  # the next one is news again
        return version.version, self._rank, failures

    def _read(self, buffer: Buffer, version: VersionId) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take a private copy at once: the buffer will be needed again two versions later."""
        private = memoryview(bytearray(buffer.data[: buffer.data_bytes]))
        buffer.verify()
        if buffer.id != version:
            raise IntegrityError(f"version {version.version} was overwritten while it was being copied")
        return shard.read(private)

    def _write(self, version: VersionId, stable: dict[str, Any], volatile: dict[str, Any]) -> None:
        tag = f"global_step{version.version}"
        # The generation keeps an attempt that died apart from the one that follows.
        work = self.directory / f".{tag}.{version.generation}.tmp"
        self.discard_abandoned(before=version.version - 1)  # on a full disk, what failed before takes the room
        try:
            self._write_files(work, stable, volatile)
            if self._rank == 0:
                self._finish(tag, work)
        except BaseException as error:
            if self._rank == 0:
                shutil.rmtree(work, ignore_errors=True)  # a full disk would stay full
                raise
            try:
                (work / _failure_mark(self._rank)).touch()  # rank 0 need not wait
            except FileNotFoundError:
                raise PersistError(f"{work.name} is gone: rank 0 gave it up, or the disk is away") from error
            except OSError:
                pass  # rank 0 will find out
            raise

    def _write_files(self, work: Path, stable: dict[str, Any], volatile: dict[str, Any]) -> None:
        work.mkdir(parents=True, exist_ok=True)
        for name, content in self._files_of(stable, volatile).items():
            self._save(content, work / name)
        # Last, as the sign that this rank's other files are whole.
        self._save(
            {"volatile": volatile, "constant": stable["constant"], "world_size": self._world_size},
            work / rank_file(self._rank),
        )

    def _finish(self, tag: str, work: Path) -> None:
        deadline = time.monotonic() + _OTHERS_TIMEOUT_S
        ranks = range(self._world_size)
        while missing := [rank for rank in ranks if not (work / rank_file(rank)).exists()]:
            if failed := [rank for rank in missing if (work / _failure_mark(rank)).exists()]:
                raise PersistError(f"ranks {failed} could not write their files")
            if time.monotonic() > deadline:
                raise PersistError(f"ranks {missing} wrote nothing within {_OTHERS_TIMEOUT_S:.0f} s")
            if self._ending.wait(_POLL_S):
                raise PersistError(f"the run ended before ranks {missing} wrote their files")
        for script in self._scripts:
            _provide(script, self.directory / script.name)
        _sync_directory(work)
        final = _unused(self.directory / tag)
        work.rename(final)
        _sync_directory(self.directory)
        _replace_text(self.directory / "latest", final.name)
        for _, old in checkpoints(self.directory)[KEEP:]:
            if not is_result(old):
                shutil.rmtree(old, ignore_errors=True)
        self.discard_abandoned(before=int(tag.removeprefix("global_step")))

    def _save(self, content: Any, path: Path) -> None:
        temporary = path.with_name(path.name + ".part")
        with open(temporary, "wb") as stream:
            file = _WatchedFile(stream, self._ending)
            try:
                torch.save(content, file)  # type: ignore[arg-type]  # it only writes
            except RuntimeError as error:
                raise file.error or error from None
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)


class _WatchedFile:
    """What ``torch.save`` needs of a file; takes nothing more when the run ends, and remembers why a write failed.

    Torch makes "unexpected pos 64 vs 0" of a full disk.
    """

    def __init__(self, stream: BinaryIO, ending: threading.Event) -> None:
        self._stream, self._ending = stream, ending
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self._ending.is_set():
                raise PersistError("the run ended before it was written")
            return self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._stream.flush()


def _wait_for(previous: threading.Thread | None) -> None:
    """Rank 0 may begin anew when it has seen the last file of another rank, whose thread is then just about to end."""
    if previous is not None:
        previous.join(_PREVIOUS_TIMEOUT_S)
        if previous.is_alive():
            raise PersistError("the one before it is still being written")


def _unused(final: Path) -> Path:
    """An older checkpoint of the same step may be the one that ``latest`` names: it stays until it is replaced."""
    names = itertools.chain([final], (final.with_name(f"{final.name}.{number}") for number in itertools.count(1)))
    return next(path for path in names if not path.exists())


def _provide(script: Path, target: Path) -> None:
    """Copy a script that is not there yet; one that is stays whole whatever happens."""
    text = script.read_text()
    if not target.exists() or target.read_text() != text:
        _replace_text(target, text)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
