"""Persists on a disk in trouble (``disk_trouble.c``, preloaded), and checks what is left; prints what it saw as JSON.

``troubled_disk.py DIRECTORY``: first, every file operation takes long. Then a process that persists as two ranks do is
killed before every file operation in turn.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.persistent_directory import checkpoints
from tests.dataplane.test_persister import (
    assert_consistent,
    buffer_with,
    latest,
    persist,
    persister,
    restart_and_persist,
    write,
)

library = ctypes.CDLL(os.environ["LD_PRELOAD"])


def crashes(directory: Path) -> dict[str, object]:
    """Kills at operation 0, 1, … until the checkpoint is whole; a reader must find a whole one every time."""
    before, names = directory / "before", []
    persist(before, 10, 20)
    for point in itertools.count():
        here = directory / f"at{point}"
        shutil.copytree(before, here)
        status = killed_at(point, here)
        assert_consistent(here, 30)
        if not os.WIFSIGNALED(status):
            assert (os.WEXITSTATUS(status), latest(here)) == (0, "global_step30")
            return {"crashes": point, "latest": names}
        assert os.WTERMSIG(status) == signal.SIGKILL
        names.append(latest(here))
        restart_and_persist(here)
        shutil.rmtree(here)
    raise AssertionError


def killed_at(point: int, directory: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            library.disk_trouble(str(directory).encode(), ctypes.c_long(point), ctypes.c_long(0))
            write(directory, 1, 30)
            write(directory, 0, 30)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def slow(directory: Path) -> dict[str, object]:
    """One checkpoint that takes long while this thread goes on, and one that the end of the run cuts short."""
    buffers = [buffer_with(0, step) for step in (10, 20)]
    library.disk_trouble(str(directory).encode(), ctypes.c_long(-1), ctypes.c_long(20_000))
    one = persister(directory, 0, world=1)
    began = time.monotonic()
    one.start(buffers[0], VersionId(1, 10))
    started_s = time.monotonic() - began
    one.close()
    took_s, operations = time.monotonic() - began, library.disk_trouble_done()
    library.disk_trouble(str(directory).encode(), ctypes.c_long(-1), ctypes.c_long(200_000))
    one.start(buffers[1], VersionId(1, 20))
    while library.disk_trouble_done() < 2:
        time.sleep(0.01)
    one.close(timeout_s=0.05)
    threads = [thread.name for thread in threading.enumerate() if thread.name == "gemini-persist"]
    found = [step for step, _ in checkpoints(directory)]
    return {"start_s": started_s, "took_s": took_s, "operations": operations, "threads": threads, "found": found}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    place = Path(sys.argv[1])
    print(json.dumps({**slow(place / "slow"), **crashes(place / "crashes")}))
