"""One of two ranks that issue collectives under a tap; ``python tapped_rank.py DIRECTORY RANK``.

Rank 0 writes what it saw to ``DIRECTORY/seen.json``. At the end rank 1 kills itself while rank 0 is in a collective.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.comm import comm

from lightning_gemini.dataplane.collective_tap import CollectiveTap

TIMEOUT_S = 30.0


class Listener:
    """Writes everything down; raises where a test wants it."""

    def __init__(self, fail_on: str = "") -> None:
        self.fail_on = fail_on
        self.names: list[tuple[str, int]] = []
        self.events: list[tuple[str, int]] = []
        self._changed = threading.Condition()

    def began(self, name: str, size_bytes: int) -> int:
        if self.fail_on == "began":
            raise ArithmeticError("a fault of the listener")
        with self._changed:
            self.names.append((name, size_bytes))
            self.events.append(("began", len(self.names) - 1))
            return len(self.names) - 1

    def ended(self, token: int) -> None:
        if self.fail_on == "ended":
            raise ArithmeticError("a fault of the listener")
        with self._changed:
            self.events.append(("ended", token))
            self._changed.notify_all()

    def ends(self, token: int) -> int:
        return self.events.count(("ended", token))

    def wait_ended(self, token: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.ends(token)), TIMEOUT_S)


def observed(listener: Any) -> CollectiveTap:
    tap = CollectiveTap(listener)
    tap.install()
    return tap


def every_kind(listener: Listener) -> dict[str, Any]:
    """Calls whose bytes are known, blocking ones and asynchronous ones."""
    tap = observed(listener)
    world = dist.get_world_size()
    dist.all_reduce(torch.ones(10))
    dist.broadcast(torch.ones(3, dtype=torch.float64), src=0)
    dist.all_gather([torch.empty(5, dtype=torch.int64) for _ in range(world)], torch.ones(5, dtype=torch.int64))
    dist.all_gather_into_tensor(torch.empty(7 * world), torch.ones(7), async_op=True).wait()
    dist.allgather_fn(torch.empty(2 * world), torch.ones(2))
    dist.reduce_scatter_fn(torch.empty(4), torch.ones(4 * world))
    dist.reduce(torch.ones(6), dst=0)
    dist.barrier()
    complete = [listener.wait_ended(token) for token in range(len(listener.names))]
    tap.remove()
    dist.all_reduce(torch.ones(1))  # not seen
    return {"names": listener.names, "events": listener.events, "complete": complete}


def late_peer(listener: Listener, store: torch.distributed.Store, rank: int) -> dict[str, Any]:
    """Rank 1 joins only when rank 0 has looked whether the collective is complete."""
    if rank == 1:
        store.wait(["looked"], timedelta(seconds=TIMEOUT_S))
        dist.all_reduce(torch.ones(4))
        return {}
    tap = observed(listener)
    value = torch.ones(4)
    work = dist.all_reduce(value, async_op=True)
    before = listener.ends(0)
    store.set("looked", "yes")
    work.wait()
    told = listener.wait_ended(0)
    tap.remove()
    return {"before": before, "told": told, "after": listener.ends(0), "value": value.tolist()}


def bad_call(listener: Listener) -> dict[str, Any]:
    tap = observed(listener)
    try:
        dist.all_reduce("no tensor")
        raised = ""
    except Exception as error:
        raised = type(error).__name__
    tap.remove()
    return {"raised": raised, "ends": listener.ends(0)}


def bad_listener(fail_on: str, async_op: bool) -> dict[str, Any]:
    warnings: list[str] = []
    logger = logging.getLogger("lightning_gemini.dataplane.collective_tap")
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    listener = Listener(fail_on)
    tap = observed(listener)
    sums = []
    for _ in range(3):
        value = torch.ones(2)
        work = dist.all_reduce(value, async_op=async_op)
        if work is not None:
            work.wait()
        sums.append(value.tolist())
    deadline = time.monotonic() + TIMEOUT_S
    while not warnings and time.monotonic() < deadline:  # gloo's thread may report after the wait
        time.sleep(0.001)
    dist.barrier()
    tap.remove()
    logger.removeHandler(handler)
    return {"sums": sums, "warnings": warnings}


def two_taps() -> dict[str, Any]:
    original = comm.cdb
    below, above = Listener(), Listener()
    first, second = observed(below), observed(above)
    second.install()  # once more: no second report
    dist.barrier()
    first.remove()  # not on top: stays in place, silent
    dist.barrier()
    second.remove()
    dist.barrier()
    first.remove()
    names = (below.names, above.names)
    return {"counts": [len(found) for found in names], "backend_is_a_tap": comm.cdb is not original}


def attributes() -> dict[str, Any]:
    original = comm.cdb
    tap = observed(Listener())
    same = all(
        getattr(comm.cdb, name) == getattr(original, name) for name in ("name", "using_mpi", "has_all_reduce_coalesced")
    )
    world = dist.get_world_size()
    tap.remove()
    return {"same": same, "world": world, "back": comm.cdb is original}


def dead_peer(listener: Listener, store: torch.distributed.Store, rank: int) -> dict[str, Any]:
    if rank == 1:
        store.wait(["in the last one"], timedelta(seconds=TIMEOUT_S))
        os.kill(os.getpid(), signal.SIGKILL)
    tap = observed(listener)
    work = dist.all_reduce(torch.ones(4), async_op=True)
    store.set("in the last one", "yes")
    try:
        work.wait()
        raised = False
    except RuntimeError:
        raised = True
    told = listener.wait_ended(0)
    tap.remove()
    return {"raised": raised, "told": told, "ends": listener.ends(0)}


def main(directory: Path, rank: int) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    store = torch.distributed.FileStore(str(directory / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    deepspeed.init_distributed("gloo")
    words = torch.distributed.PrefixStore("words", store)
    seen = {
        "every_kind": every_kind(Listener()),
        "late_peer": late_peer(Listener(), words, rank),
        "bad_call": bad_call(Listener()),
        "bad_began": bad_listener("began", async_op=False),
        "bad_ended": bad_listener("ended", async_op=False),
        "bad_ended_late": bad_listener("ended", async_op=True),
        "two_taps": two_taps(),
        "attributes": attributes(),
        "dead_peer": dead_peer(Listener(), words, rank),
    }
    (directory / "seen.json").write_text(json.dumps(seen))
    os._exit(0)  # the group cannot be left in order: the peer is dead


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
