"""The interface that every transport keeps; ``tests/dataplane/test_transport_contract.py`` holds them to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.pacer import Pacer
from lightning_gemini.dataplane.slab import Buffer


@dataclass(frozen=True, slots=True)
class Peer:
    """Another machine's agent.

    Attributes:
        machine: Its machine rank.
        address: Host and port of its replica server.
    """

    machine: int
    address: tuple[str, int]


class ReplicaTransport(Protocol):
    """Carries shards to one peer. One thread uses an instance at a time."""

    def push(
        self,
        buffer: Buffer,
        version: VersionId,
        still_wanted: Callable[[], bool],
        kept: VersionId | None = None,
        pacer: Pacer | None = None,
    ) -> bool:
        """Make ``version`` complete on the peer, streaming chunks as the writer seals them.

        ``kept`` is the complete version in the owner's other buffer. What the peer holds between the two was given up
        by all ranks; the peer forgets it, so that it overwrites that rather than the last common version. ``pacer``
        says when bytes may travel, and how many; without it all go at once.

        Returns once the peer has verified every byte (``True``), or the version was given up because ``still_wanted``
        turned false (``False``). The peer's previous complete version stays intact until then, and for good on failure.

        Raises:
            OSError: The peer cannot be reached or refused; nothing of the version counts there.
        """

    def close(self) -> None:
        """Close the connection; idempotent."""

    def abort(self) -> None:
        """Make the call in progress, and all that follow, fail at once. The one method for another thread."""


class RetrievalTransport(ReplicaTransport, Protocol):
    """Brings shards back as well; after a failure that is always from agent to agent."""

    def fetch(self, owner: int, version: VersionId, allocate: Callable[[int], Buffer]) -> int:
        """Bring a complete shard from the peer into the buffer that ``allocate(data_bytes)`` returns.

        Returns:
            The bytes received; the buffer is complete and verified.

        Raises:
            IntegrityError: The peer's bytes do not match their checksums.
            OSError: The peer cannot be reached, or does not hold the version.
        """
