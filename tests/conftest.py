"""What every test relies on: the device, a printed seed, and a check that nothing stays behind.

Tests run on the CPU. ``LIGHTNING_GEMINI_TEST_DEVICE=cuda`` lets those see the GPUs that need one, and trains on GPUs
where a test trains: every machine of a job then uses this machine's first GPUs.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports torch or deepspeed, in this process and in those that the tests start.
os.environ.setdefault("LIGHTNING_GEMINI_TEST_DEVICE", "cpu")
os.environ.setdefault("DS_ACCELERATOR", os.environ["LIGHTNING_GEMINI_TEST_DEVICE"])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update({"CUDA_VISIBLE_DEVICES": ""} if os.environ["LIGHTNING_GEMINI_TEST_DEVICE"] == "cpu" else {})

import hypothesis
import psutil
import pytest

from lightning_gemini.controlplane.kv.etcd import load_etcd3

load_etcd3()  # before another test brings in protobuf's other implementation

DEVICE = os.environ["LIGHTNING_GEMINI_TEST_DEVICE"]
SHARED_MEMORY = Path("/dev/shm")
SESSION_VARIABLE = "LIGHTNING_GEMINI_TEST_SESSION"
GRACE_S = 10.0
"""Processes that were told to end get this long before they count as left behind."""

hypothesis.settings.register_profile("shared-machine", deadline=None, print_blob=True)
hypothesis.settings.load_profile("shared-machine")


def _session_seed() -> int:
    # In the environment, so that the test processes that pytest-xdist starts draw the same.
    return int(os.environ.setdefault("LIGHTNING_GEMINI_TEST_SEED", str(time.time_ns() % 2**31)))


SEED = _session_seed()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"seed: {SEED} (repeat with LIGHTNING_GEMINI_TEST_SEED={SEED})"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for the test, printed so that a failure can be repeated."""
    print(f"{request.node.nodeid}: LIGHTNING_GEMINI_TEST_SEED={SEED}")
    return SEED


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the session if it left a process or an entry in /dev/shm behind."""
    # Every process that a test starts inherits the mark, so one that lost its parent is found too.
    mark = f"{os.getpid()}-{uuid.uuid4().hex}"
    os.environ[SESSION_VARIABLE] = mark
    entries = _shared_memory()
    yield
    processes = _when_gone(lambda: _descendants(mark))
    assert not processes, f"the tests left processes behind: {[_describe(process) for process in processes]}"
    memory = _when_gone(lambda: [path for path in sorted(_shared_memory() - entries) if not _used_by_others(path)])
    assert not memory, f"the tests left shared memory behind: {memory}"


def _when_gone(find: Callable[[], list]) -> list:
    deadline = time.monotonic() + GRACE_S
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _shared_memory() -> set[Path]:
    return set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()


def _used_by_others(path: Path) -> bool:
    """Says whether a live process maps ``path``; the tests left none, so it belongs to someone else on the machine."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(area.path == str(path) for area in process.memory_maps()):
                return True
        except psutil.Error:
            continue
    return False


def _descendants(mark: str) -> list[psutil.Process]:
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    return [process for process in psutil.process_iter() if _is_left(process, children, mark)]


def _is_left(process: psutil.Process, children: set[int], mark: str) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        marked = process.pid in children or process.environ().get(SESSION_VARIABLE) == mark
        # The tracker of multiprocessing ends with the test process, by design.
        return marked and "multiprocessing.resource_tracker" not in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid} (gone)"
