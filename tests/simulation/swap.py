"""Puts the simulated clock, threads, network and kernel under the package's own modules."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lightning_gemini.dataplane import snapshot
from lightning_gemini.dataplane.pacer import Underway
from tests.simulation import memory, processes, sockets, threads
from tests.simulation.scheduler import Active

_CHUNK_BYTES = 512
_STANDARD = {
    "threading": threads.threading,
    "queue": threads.queue,
    "time": threads.time,
    "socket": sockets.socket,
    "os": memory.os,
    "mmap": memory.mmap,
}
_UNDER_TEST = (
    "callbacks.peer_memory",
    "callbacks.publisher",
    "controlplane.agent",
    "controlplane.agent_client",
    "controlplane.control_socket",
    "controlplane.election",
    "controlplane.events",
    "controlplane.link_survey",
    "controlplane.membership",
    "controlplane.messages",
    "controlplane.receptions",
    "controlplane.reconcile",
    "controlplane.refusal",
    "controlplane.root_agent",
    "controlplane.session",
    "controlplane.slot_agent",
    "controlplane.warm_pool",
    "controlplane.worker_agent",
    "controlplane.worker_group",
    "dataplane.link_speed",
    "dataplane.pace_page",
    "dataplane.pacer",
    "dataplane.replicator",
    "dataplane.resident_memory",
    "dataplane.slab",
    "dataplane.snapshot",
    "dataplane.store",
    "dataplane.transport.chunk_stream",
    "dataplane.transport.paced_stream",
    "dataplane.transport.reception",
    "dataplane.transport.replica_server",
    "dataplane.transport.tcp",
    "dataplane.wire",
)
_REPLACED = (
    "callbacks.ranks",
    "controlplane.fork_server",
    "controlplane.processes",
    "controlplane.run_directory",
    "controlplane.standalone",
    "controlplane.template",
    "controlplane.worker_env",
    "dataplane.pinned_memory",
)
"""Modules whose work is done by a simulated part, or that no simulated process uses."""


def left_real() -> list[str]:
    """Modules of the package that the simulation has loaded, and that would still look at the real clock."""
    real = {name: importlib.import_module(name) for name in ("threading", "time", "queue", "socket")}
    known = {f"lightning_gemini.{name}" for name in (*_UNDER_TEST, *_REPLACED)}
    loaded = [(name, module) for name, module in sys.modules.items() if name.startswith("lightning_gemini.")]
    return [
        name
        for name, module in loaded
        if name not in known and any(getattr(module, attribute, None) is found for attribute, found in real.items())
    ]


def _listen(path: Any) -> sockets.Socket:
    return sockets.Socket().listen_at(str(path))


_real_pieces = snapshot._pieces


def _pieces(*arguments: Any) -> Iterator[Any]:
    """Copying takes time, and other threads run meanwhile."""
    for piece in _real_pieces(*arguments):
        yield piece
        scheduler = Active.scheduler
        if scheduler.random.random() < 0.3:
            scheduler.sleep(scheduler.random.random() * 0.01)


# Besides what is simulated: how often something is looked at that only costs switches here.
_PARTS: dict[str, dict[str, Any]] = {
    "callbacks.publisher": {"SimpleQueue": threads.SimpleQueue, "_POLL_S": 0.003},
    "controlplane.control_socket": {"_listen": _listen},
    "controlplane.events": {"append_line": lambda path, line: None},
    "controlplane.warm_pool": {"kill_group": processes.kill_group, "wait_gone": processes.wait_gone},
    "controlplane.worker_agent": {"link_slot": lambda *_: None, "unlink_slot": lambda *_: None},
    "dataplane.shard": {"SMALL_BYTES": 256},
    "dataplane.resident_memory": {"require_free": lambda more_bytes: None, "_populate": lambda mapping: True},
    "dataplane.slab": {"chunk_bytes_for": lambda data_bytes: _CHUNK_BYTES},
    "dataplane.snapshot": {"SimpleQueue": threads.SimpleQueue, "_pieces": _pieces},
    "dataplane.transport.chunk_stream": {"_POLL_S": 0.003},
    "dataplane.pacer": {"_POLL_S": 0.003, "_LONGEST_POLL_S": 0.003},
    "dataplane.transport.paced_stream": {"underway": lambda sock: Underway()},
    "dataplane.store": {"require_memory": lambda *_, **__: None},
}


class _Notes(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        fiber = Active.scheduler.current
        self._note(f"{fiber.name if fiber else 'nobody'}: {record.getMessage()}")


@contextlib.contextmanager
def simulated(note: Callable[[str], None], level: int) -> Iterator[None]:
    """Swaps the modules' attributes, and sends what they log to ``note``, until the context ends."""
    saved: list[tuple[Any, str, Any]] = []
    for name in _UNDER_TEST:
        module = importlib.import_module(f"lightning_gemini.{name}")
        for attribute, stand_in in _STANDARD.items():
            if hasattr(module, attribute):
                saved.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, stand_in)
    for name, parts in _PARTS.items():
        module = importlib.import_module(f"lightning_gemini.{name}")
        for attribute, stand_in in parts.items():
            saved.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, stand_in)
    logger, handler = logging.getLogger("lightning_gemini"), _Notes(note)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        for module, attribute, original in reversed(saved):
            setattr(module, attribute, original)
        memory.forget_all()
