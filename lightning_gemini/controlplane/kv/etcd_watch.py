"""A watch on etcd that survives the loss of its member, its connection, and all of etcd."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lightning_gemini.controlplane.kv.base import KeyChange, KeyValue, WatchCallback
from lightning_gemini.controlplane.kv.connection import EtcdConnection, load_etcd3

_log = logging.getLogger(__name__)
_RECONNECT_S = 0.2
# A member cut off from the others would keep a watch open and tell it nothing.
_REQUIRE_LEADER = (("hasleader", "true"),)


class EtcdWatch:
    """Follows a prefix: a full read, then the stream from that revision; after any error the same again.

    etcd3's own watcher spins without pause while etcd is away, and forgets its callbacks.

    Args:
        connection: Where the stream runs; it ends when the connection leaves that member.
        read_prefix: Reads all keys below the prefix, with the store's revision.
        prefix: What is followed.
        callback: See `KeyValueStore.watch_prefix`.
    """

    def __init__(
        self,
        connection: EtcdConnection,
        read_prefix: Callable[[str], tuple[list[KeyValue], int]],
        prefix: str,
        callback: WatchCallback,
    ) -> None:
        self._connection, self._read_prefix = connection, read_prefix
        self._prefix, self._callback = prefix, callback
        self._known: dict[str, KeyValue] | None = None
        self._closed = threading.Event()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name=f"watch {prefix}", daemon=True)

    def start(self) -> None:
        """Begins to follow, on a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """See `Watch.close`."""
        self._closed.set()
        if self._stream is not None:
            self._stream.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(3)

    def _run(self) -> None:
        while not self._closed.is_set():
            ended = threading.Event()
            try:
                self._follow(self._catch_up(), ended)
            except Exception as error:
                if not self._closed.is_set():
                    _log.debug("watch on %s interrupted: %r", self._prefix, error)
            finally:
                ended.set()
            self._closed.wait(_RECONNECT_S)

    def _catch_up(self) -> int:
        found, revision = self._read_prefix(self._prefix)
        now = {kv.key: kv for kv in found}
        before = self._known or {}
        changes = [KeyChange(key, None) for key in before.keys() - now.keys()]
        changes += [KeyChange(kv.key, kv) for kv in found if before.get(kv.key) != kv]
        if changes or self._known is None:
            self._callback(changes)
        self._known = now
        return revision

    def _follow(self, revision: int, ended: threading.Event) -> None:
        self._stream = self._open(revision, ended)
        if self._closed.is_set():
            self._stream.cancel()
        for response in self._stream:
            if response.canceled or response.compact_revision:
                return
            changes = [self._change(event) for event in response.events]
            if changes:
                self._callback(changes)

    def _open(self, revision: int, ended: threading.Event) -> Any:
        """Starts a watch stream after ``revision``; gRPC reads its requests until ``ended`` is set."""
        etcdrpc = load_etcd3().etcdrpc
        create = etcdrpc.WatchCreateRequest(
            key=self._prefix.encode(), range_end=_after_prefix(self._prefix.encode()), start_revision=revision + 1
        )

        def requests() -> Iterator[Any]:
            yield etcdrpc.WatchRequest(create_request=create)
            ended.wait()

        channel = self._connection.client().channel
        return etcdrpc.WatchStub(channel).Watch(requests(), metadata=_REQUIRE_LEADER)

    def _change(self, event: Any) -> KeyChange:
        assert self._known is not None
        key = event.kv.key.decode()
        if event.type == event.DELETE:
            self._known.pop(key, None)
            return KeyChange(key, None)
        now = KeyValue(key, event.kv.value.decode(), event.kv.create_revision)
        self._known[key] = now
        return KeyChange(key, now)


def _after_prefix(prefix: bytes) -> bytes:
    """Returns the first key after all that start with ``prefix`` (which is ASCII, so its last byte can grow)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
