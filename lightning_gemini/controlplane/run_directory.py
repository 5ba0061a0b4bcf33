"""The directory of one run: who uses it, where its processes are, and how the command line finds it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.events import EVENTS_FILE
from lightning_gemini.controlplane.processes import start_time
from lightning_gemini.controlplane.standalone import runtime_dir
from lightning_gemini.errors import ConfigurationError

JOB_FILE = "job.json"
_SOCKET_PATH_LIMIT = 100  # bytes
_KERNELS_LIMIT = 107  # without the zero at the end
_LONG_NAME = 16


@dataclass(slots=True)
class RunDirectory:
    """A run directory that this process holds; the kernel gives it up with the process.

    Attributes:
        path: Absolute path.
        lock: Descriptor of the locked file.
    """

    path: Path
    lock: int

    @classmethod
    def claim(cls, path: Path | None) -> RunDirectory:
        """Makes the directory, mode 0700, and locks it; what an earlier job left moves to ``earlier/<time>``.

        Raises:
            ConfigurationError: If a live job uses it, or it cannot be written.
        """
        path = (path or Path("runs") / time.strftime("%Y%m%d-%H%M%S")).absolute()
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.chmod(0o700)
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write the run directory {path} ({error}): give another --run-dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ConfigurationError(
                f"a live job uses the run directory {path}: end it (`lightning-gemini stop --run-dir {path}`) "
                "or give another --run-dir"
            ) from None
        run = cls(path, lock)
        run._remove_remains()
        run._set_aside()
        for name in ("logs", "nodes"):
            (path / name).mkdir(exist_ok=True, mode=0o700)
        return run

    def sockets(self, job: str, nodes: int) -> dict[int, Path]:
        """Returns where the agent of each slot is found."""
        return {slot: slot_socket(self.path, job, slot) for slot in range(nodes)}

    def template_socket(self, job: str) -> Path:
        """Returns where the import template listens."""
        return _socket(self.path / "template.sock", f"{job}-template.sock")

    def write_secret(self) -> Path:
        """Draws the job's secret into a file that only this user reads."""
        path = self.path / "secret"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        return path

    def write_job(self, fields: dict[str, Any]) -> None:
        """Publishes the job: ``job.json``, and the link by which the newest run is found."""
        launcher = {"launcher_pid": os.getpid(), "launcher_start_time": start_time(os.getpid())}
        temporary = self.path / f".{JOB_FILE}"
        temporary.write_text(json.dumps({**fields, **launcher}, indent=1))
        temporary.replace(self.path / JOB_FILE)
        link = runtime_dir() / f".latest-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(self.path)
        link.replace(runtime_dir() / "latest")

    def close(self) -> None:
        """Removes the secret and the sockets and gives the directory up; idempotent."""
        if self.lock >= 0:
            self._remove_remains()
            os.close(self.lock)
            self.lock = -1

    def _remove_remains(self) -> None:
        """Removes what only a live job needs; a launcher that was killed left it behind."""
        (self.path / "secret").unlink(missing_ok=True)
        (self.path / "etcd" / "pids.json").unlink(missing_ok=True)
        for data in (self.path / "etcd").glob("data*"):
            shutil.rmtree(data, ignore_errors=True)
        for socket in [*self.path.glob("*.sock"), *self.path.glob("nodes/*/*.sock")]:
            socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError, KeyError):
            job = json.loads((self.path / JOB_FILE).read_text())["job"]
            for socket in runtime_dir().glob(f"{glob.escape(job)}-*.sock"):
                socket.unlink(missing_ok=True)

    def _set_aside(self) -> None:
        old = [
            self.path / name
            for name in (JOB_FILE, EVENTS_FILE, "logs", "stats", "steps")
            if (self.path / name).exists()
        ]
        if old:
            place = self.path / "earlier" / time.strftime("%Y%m%d-%H%M%S")
            while place.exists():
                place = place.with_name(place.name + "+")
            place.mkdir(parents=True)
            for each in old:
                each.rename(place / each.name)


def slot_socket(run_dir: Path, job: str, slot: int) -> Path:
    """Returns where the agent of a slot is found: a link to the socket of the machine that has it."""
    return _socket(run_dir / "nodes" / str(slot) / "agent.sock", f"{job}-{slot}.sock")


def machine_socket(run_dir: Path, job: str, name: str) -> Path:
    """Returns where the agent of a machine listens."""
    # A scheduler's names alone take most of what the path of a unix socket may have.
    short = name if len(name) <= _LONG_NAME else hashlib.sha256(name.encode()).hexdigest()[:12]
    return _socket(run_dir / "nodes" / short / "machine.sock", f"{job}-machine-{short}.sock")


def link_slot(run_dir: Path, job: str, slot: int, target: Path) -> None:
    """Points a slot's well-known socket to the machine that has the slot now, in one step."""
    link = slot_socket(run_dir, job, slot)
    link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = link.with_name(f".{link.name}.{os.getpid()}.{secrets.token_hex(4)}")
    fresh.symlink_to(target)
    fresh.replace(link)


def unlink_slot(run_dir: Path, job: str, slot: int, target: Path) -> None:
    """Removes the link of a slot if it still points to this machine."""
    link = slot_socket(run_dir, job, slot)
    with contextlib.suppress(OSError):
        if os.readlink(link) == str(target):
            link.unlink()


def _socket(inside: Path, outside: str) -> Path:
    """Picks a short place outside the run directory when the path inside is too long for a unix socket."""
    if len(os.fsencode(inside)) <= _SOCKET_PATH_LIMIT:
        return inside
    path = runtime_dir() / outside
    if (length := len(os.fsencode(path))) > _KERNELS_LIMIT:
        raise ConfigurationError(
            f"the socket {path} has {length} bytes, {_KERNELS_LIMIT} are allowed: set TMPDIR to a shorter directory"
        )
    return path


def find_job(run_dir: Path | None) -> dict[str, Any]:
    """Reads the job of a run directory, by default of the newest run; adds ``run_dir`` and ``alive``.

    Raises:
        ConfigurationError: If there is none.
    """
    path = run_dir.absolute() if run_dir is not None else runtime_dir() / "latest"
    try:
        job: dict[str, Any] = json.loads((path / JOB_FILE).read_text())
    except (OSError, ValueError) as error:
        hint = "start one with `lightning-gemini run`" if run_dir is None else "is it the --run-dir of a run?"
        raise ConfigurationError(f"found no job in {path} ({error}): {hint}") from error
    alive = start_time(job["launcher_pid"]) == job["launcher_start_time"]
    return {**job, "run_dir": str(path.resolve()), "alive": alive}
