"""Machines for the tests: a real store and a real replica server on a real socket, without an agent around them."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer, Slab
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.transport.replica_server import ReplicaServer

JOB = "a-job"
SECRET = b"known to agents alone"
Self = TypeVar("Self", bound="Machine")


def shard_bytes(owner: int, version: VersionId, size: int) -> bytes:
    """Bytes that belong to this shard and to no other; the same in every process."""
    return random.Random(f"{owner} {version}").randbytes(size)


def write_version(buffer: Buffer, version: VersionId, size: int, *, until_byte: int | None = None) -> bytes:
    """Write a version as a worker does; only its first bytes, unfinished, with ``until_byte``."""
    content = shard_bytes(buffer.owner, version, size)
    buffer.begin(version, size)
    buffer.data[:size] = content
    buffer.seal(size if until_byte is None else until_byte)
    if until_byte is None:
        buffer.complete()
    return content


def content_of(buffer: Buffer) -> bytes:
    buffer.verify()
    return bytes(buffer.data[: buffer.data_bytes])


def complete_ids(slab: Slab | None) -> list[VersionId | None]:
    return [buffer.id for buffer in slab.complete()] if slab else []


class Machine:
    """One machine of a job; its ranks own slabs, its server takes in replicas and gives out shards."""

    def __init__(self, rank: int, machines: int = 2, *, nproc: int = 1, generation: int = 1, replicas: int = 2) -> None:
        self.rank = rank
        self.store = ShardStore(rank)
        self.store.enter_generation(generation, machines, nproc)
        self.store.set_replication(replicas, "mixed" if machines > 1 else "group")
        self.server = ReplicaServer("127.0.0.1", JOB, SECRET, self.store)
        self.server.start()
        self.peer = Peer(rank, self.server.address)

    def transport_to(self, other: Peer) -> TcpTransport:
        return TcpTransport(other, JOB, SECRET, self.rank, self.store.generation)

    def retrieval(self, owner: int, version: VersionId) -> Callable[[int], Buffer]:
        return lambda size: self.store.retrieval_target(owner, version, size)

    def close(self) -> None:
        self.server.close()
        self.store.wait_for_writers(10.0)
        self.store.clear()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
