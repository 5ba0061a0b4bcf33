"""Flips one byte of a version in an agent's memory, from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_gemini.core.failure_model import Draws
from lightning_gemini.dataplane.slab import HEADER_BYTES, BufferState

# The first words of dataplane/header.py: magic, owner, state, generation, version, bytes of data.
_HEADER = struct.Struct("<6Q")
_NAME = re.compile(r"^/memfd:lightning-gemini-\d+ ")


@dataclass(frozen=True, slots=True)
class Flip:
    """One flipped byte.

    Attributes:
        owner: Global rank whose shard it belongs to.
        version: Optimizer step of the version.
        version_generation: The generation that wrote it.
        offset: Of the byte in the shard.
        mask: What was xor-ed to it.
    """

    owner: int
    version: int
    version_generation: int
    offset: int
    mask: int


def flip_byte(agent: int, writers: Iterable[int], draws: Draws, owner: int | None = None) -> Flip | None:
    """Flips a byte of the newest complete version of one shard that an agent holds.

    Everybody who writes the memory stands still meanwhile: a byte flipped while a version is being written would be
    covered by its checksum, and nobody could ever tell.

    Args:
        agent: Process id of the agent.
        writers: Process ids of the machine's workers.
        draws: Picks shard, byte and bit pattern.
        owner: Take the shard of this global rank.

    Returns:
        What was flipped; None if the agent holds no complete version, or is gone.
    """
    with contextlib.ExitStack() as stopped:
        for pid in (agent, *writers):
            stopped.enter_context(_standing_still(pid))
        newest: dict[int, tuple[int, int, int, int]] = {}
        for descriptor, held_by, generation, version, size in _complete(agent):
            newest[held_by] = max(newest.get(held_by, (0, -1, 0, 0)), (generation, version, size, descriptor))
        owners = sorted(newest) if owner is None else [owner] if owner in newest else []
        if not owners:
            return None
        chosen = draws.choice(owners)
        generation, version, size, descriptor = newest[chosen]
        flip = Flip(chosen, version, generation, draws.randrange(size), 1 + draws.randrange(255))
        return flip if _write(agent, descriptor, flip) else None


@contextlib.contextmanager
def _standing_still(pid: int) -> Iterator[None]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        _await_stop(pid)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _await_stop(pid: int) -> None:
    """The signal stops every thread, but not before each has left the kernel or the processor it runs on."""
    for _ in range(10_000):
        states = set(_thread_states(pid))
        if states <= set("tTZX"):
            return
        os.sched_yield()


def _thread_states(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/stat") as stat:
                yield stat.read().rpartition(")")[2].split()[0]


def _complete(agent: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yields descriptor, owner, generation, version and data bytes of every complete version in an agent's memory."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{agent}/fd"):
            with contextlib.suppress(OSError):
                path = f"/proc/{agent}/fd/{entry}"
                if _NAME.match(os.readlink(path)):
                    with open(path, "rb", buffering=0) as memory:
                        _, owner, state, generation, version, size = _HEADER.unpack(memory.read(_HEADER.size))
                    if state == BufferState.COMPLETE and size:
                        yield int(entry), owner, generation, version, size


def _write(agent: int, descriptor: int, flip: Flip) -> bool:
    place = HEADER_BYTES + flip.offset
    with contextlib.suppress(OSError), open(f"/proc/{agent}/fd/{descriptor}", "r+b", buffering=0) as memory:
        (byte,) = os.pread(memory.fileno(), 1, place)
        return os.pwrite(memory.fileno(), bytes([byte ^ flip.mask]), place) == 1
    return False
