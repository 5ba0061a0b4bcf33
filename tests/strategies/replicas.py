"""Looks at what a machine's agent holds of a rank's shard: the very memory, through ``/proc``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_gemini.controlplane import standalone
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer


def content_of(buffer: Buffer) -> bytes:
    """The bytes of a complete buffer, after their checksums."""
    buffer.verify()
    return bytes(buffer.data[: buffer.data_bytes])


class HolderMemory:
    """The memory of a machine that was started without a launcher.

    Args:
        job: The job's id.
        machine: Rank of the machine.
    """

    def __init__(self, job: str, machine: int) -> None:
        with AgentClient(standalone.socket_path(job, machine), job) as client:
            self._descriptors = Path(f"/proc/{client.identity['pid']}/fd")

    def replica(self, owner: int, version: VersionId) -> bytes | None:
        """What it holds of a version of a rank's shard; ``None`` where that is not complete."""
        for path in self._descriptors.iterdir():
            with _buffer(path, owner) as buffer:
                if buffer is not None and buffer.view.complete and buffer.id == version:
                    return content_of(buffer)
        return None


@contextmanager
def _buffer(path: Path, owner: int) -> Iterator[Buffer | None]:
    try:
        ours = os.readlink(path) == f"/memfd:lightning-gemini-{owner} (deleted)"
    except FileNotFoundError:  # the agent closed it meanwhile
        ours = False
    buffer = Buffer(os.open(path, os.O_RDWR)) if ours else None
    try:
        yield buffer
    finally:
        if buffer is not None:
            buffer.close()
