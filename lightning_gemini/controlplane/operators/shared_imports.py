"""The process that imports once for all machines of this host, from the side of whoever starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_gemini.controlplane.operators.base import JobAccess
from lightning_gemini.controlplane.warm_pool import pool_environment

_START_TIMEOUT_S = 10.0


class SharedImports:
    """Starts `lightning_gemini.controlplane.template`, from the process's main thread; it dies with this process.

    Args:
        access: The job.
        path: Its socket; None: there is none, each machine imports for itself.
        modules: What it imports.
    """

    def __init__(self, access: JobAccess, path: Path | None, modules: Sequence[str]) -> None:
        self._access, self._path, self._modules = access, path, modules
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pids(self) -> list[int]:
        """Its process id, once it was started."""
        return [] if self._process is None else [self._process.pid]

    def start(self) -> None:
        """Starts it, once, and waits until agents can queue up for it."""
        if self._path is None or self._process is not None:
            return
        command = [sys.executable, "-m", "lightning_gemini.controlplane.template", "--socket", str(self._path)]
        with (self._access.run_dir / "logs" / "template.out").open("ab") as output:
            self._process = subprocess.Popen(
                [*command, "--parent", str(os.getpid()), *self._modules],
                env=pool_environment({**os.environ, "LIGHTNING_GEMINI_JOB": self._access.job}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._path.exists() and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
