"""Known bad protocols, to prove that the simulator finds what it is made to find."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from lightning_gemini.callbacks import publisher
from lightning_gemini.callbacks.peer_memory import PeerMemory
from lightning_gemini.callbacks.publisher import VersionPublisher
from lightning_gemini.controlplane.election import Election
from lightning_gemini.controlplane.slot_agent import SlotAgent
from lightning_gemini.controlplane.warm_pool import WarmPool
from lightning_gemini.core.consistency import BufferView
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.replicator import Replicator
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.store import ShardStore

Mutation = Callable[[], AbstractContextManager[object]]


def _oldest(buffers: tuple[BufferView, BufferView], _: VersionId | None) -> int:
    return min((0, 1), key=lambda index: (buffers[index].id is not None, buffers[index].id or VersionId(0, 0)))


@contextlib.contextmanager
def _reuse_before_commit() -> Iterator[None]:
    """A rank overwrites v-1 as soon as it wants to write v+1, whether v is committed or not."""
    with (
        patch.object(VersionPublisher, "ready", lambda self, step: True),
        patch.object(publisher, "writable_buffer", _oldest),
    ):
        yield


def _delete_before_acknowledged() -> AbstractContextManager[object]:
    """A holder deletes v-1 when v begins to arrive."""
    original = ShardStore.replica_target

    def replica_target(self: ShardStore, owner: int, version: VersionId, *rest: Any, **more: Any) -> Buffer | None:
        buffer = original(self, owner, version, *rest, **more)
        slab = self.slab(owner)
        for other in slab.buffers if slab is not None and buffer is not None else ():
            if other is not buffer:
                other.drop()
        return buffer

    return patch.object(ShardStore, "replica_target", replica_target)


def _commit_without_replicas() -> AbstractContextManager[object]:
    """A version counts as committed when every rank has written its own copy."""
    return patch.object(VersionPublisher, "_is_complete", lambda self, version: self._slab.holding(version) is not None)


@contextlib.contextmanager
def _remember_holders() -> Iterator[None]:
    """A replacement is taken to hold what the machine before it held."""
    start, retrieve = Replicator.start, SlotAgent._retrieve

    def remember(self: Replicator, peers: Any) -> None:
        held = dict(self._held)
        start(self, peers)
        self._held.update(held)

    def without_refills(self: SlotAgent, plan: Any) -> None:
        retrieve(self, dataclasses.replace(plan, refills=()))

    with (
        patch.object(Buffer, "forget_peers", lambda self: None),
        patch.object(Replicator, "start", remember),
        patch.object(SlotAgent, "_retrieve", without_refills),
    ):
        yield


def _unguarded_root() -> AbstractContextManager[object]:
    """A root that lost its lease goes on writing."""

    def put(self: Election, key: str, value: str, revision: int) -> bool:
        self.store.put(key, value)
        return True

    return patch.object(Election, "put", put)


def _leave_old_workers() -> AbstractContextManager[object]:
    """A report does not end the workers of the generation before."""
    return patch.object(WarmPool, "kill_workers", lambda self, timeout_s: True)


def _restore_own_newest() -> AbstractContextManager[object]:
    """Every rank restores the newest version that it has, whatever the others have."""
    original = PeerMemory._try

    def restore(self: PeerMemory, plan: Any) -> Any:
        slab = self.client.attach_existing()
        newest = next(slab.complete(), None) if slab is not None else None
        if newest is None or newest.id is None or newest.id <= plan.id:
            return original(self, plan)
        return shard.read(newest.data[: newest.data_bytes])

    return patch.object(PeerMemory, "_try", restore)


MUTATIONS: dict[str, Mutation] = {
    "reuse-before-commit": _reuse_before_commit,
    "delete-before-acknowledged": _delete_before_acknowledged,
    "commit-without-replicas": _commit_without_replicas,
    "remember-holders": _remember_holders,
    "unguarded-root": _unguarded_root,
    "leave-old-workers": _leave_old_workers,
    "restore-own-newest": _restore_own_newest,
}
"""By name; what each does is what its function says."""


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Puts a mutation in, if one is named."""
    if name is None:
        yield
        return
    with MUTATIONS[name]():
        yield
