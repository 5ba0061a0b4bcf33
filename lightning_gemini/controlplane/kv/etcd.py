"""The key-value store on etcd v3, through the ``etcd3`` client."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from lightning_gemini.controlplane.kv.base import (
    KeyChange,
    KeyValue,
    StoreUnavailableError,
    Watch,
    WatchCallback,
)
from lightning_gemini.controlplane.processes import PROTOBUF_VARIABLE
from lightning_gemini.errors import ConfigurationError

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")
_RECONNECT_S = 0.2
# A peer that vanished without a word must not leave a watch waiting for ever.
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


@functools.cache
def load_etcd3() -> ModuleType:
    """Imports ``etcd3``, whose generated code loads only under protobuf's pure Python implementation.

    The variable that selects it is set for the import alone, so that no child process inherits it.

    Raises:
        ConfigurationError: If another implementation of protobuf is already loaded in this process.
    """
    before = os.environ.get(PROTOBUF_VARIABLE)
    os.environ[PROTOBUF_VARIABLE] = "python"
    try:
        import etcd3
    except TypeError as error:
        raise ConfigurationError(
            "etcd3 needs protobuf's Python implementation, but this process has loaded another: import "
            f"lightning_gemini.controlplane.kv first, or set {PROTOBUF_VARIABLE}=python ({str(error).splitlines()[0]})"
        ) from error
    finally:
        if before is None:
            del os.environ[PROTOBUF_VARIABLE]
        else:
            os.environ[PROTOBUF_VARIABLE] = before
    return etcd3  # type: ignore[no-any-return]


def _answered(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Maps what etcd3 and gRPC raise to `StoreUnavailableError`."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        import grpc

        try:
            return method(*args, **kwargs)
        except (load_etcd3().Etcd3Exception, grpc.RpcError, ValueError) as error:
            raise StoreUnavailableError(f"etcd did not answer {method.__name__}: {error!r}") from error

    return call


class EtcdKeyValueStore:
    """A connection to etcd; connects on first use and again after every loss.

    Args:
        endpoint: ``HOST:PORT`` of etcd's client interface.
        timeout_s: The longest that one call may take.
    """

    def __init__(self, endpoint: str, timeout_s: float = 2.0) -> None:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigurationError(f"an etcd endpoint is HOST:PORT, got {endpoint!r}")
        self._client: Any = load_etcd3().client(host, int(port), timeout=timeout_s, grpc_options=_CHANNEL_OPTIONS)
        self._watches: list[_EtcdWatch] = []

    @_answered
    def put(self, key: str, value: str, lease: int | None = None) -> None:
        """See `KeyValueStore.put`."""
        self._client.put(key, value, lease=lease)

    @_answered
    def put_if_absent(self, key: str, value: str, lease: int | None = None) -> int | None:
        """See `KeyValueStore.put_if_absent`."""
        transactions = self._client.transactions
        stored, responses = self._client.transaction(
            compare=[transactions.create(key) == "0"],
            success=[transactions.put(key, value, lease=lease)],
            failure=[],
        )
        return int(responses[0].response_put.header.revision) if stored else None

    @_answered
    def put_guarded(self, key: str, value: str, guard: str, guard_revision: int) -> bool:
        """See `KeyValueStore.put_guarded`."""
        transactions = self._client.transactions
        stored, _ = self._client.transaction(
            compare=[transactions.create(guard) == str(guard_revision)],
            success=[transactions.put(key, value)],
            failure=[],
        )
        return bool(stored)

    @_answered
    def get(self, key: str) -> KeyValue | None:
        """See `KeyValueStore.get`."""
        value, meta = self._client.get(key)
        return None if meta is None else KeyValue(key, value.decode(), meta.create_revision)

    @_answered
    def get_prefix(self, prefix: str) -> list[KeyValue]:
        """See `KeyValueStore.get_prefix`."""
        return self._read_prefix(prefix)[0]

    @_answered
    def delete(self, key: str) -> bool:
        """See `KeyValueStore.delete`."""
        return bool(self._client.delete(key))

    @_answered
    def grant(self, ttl_s: int) -> int:
        """See `KeyValueStore.grant`."""
        return int(self._client.lease(ttl_s).id)

    @_answered
    def keep_alive(self, lease: int) -> bool:
        """See `KeyValueStore.keep_alive`."""
        return any(answer.TTL > 0 for answer in self._client.refresh_lease(lease))

    @_answered
    def revoke(self, lease: int) -> None:
        """See `KeyValueStore.revoke`."""
        self._client.revoke_lease(lease)

    def watch_prefix(self, prefix: str, callback: WatchCallback) -> Watch:
        """See `KeyValueStore.watch_prefix`."""
        watch = _EtcdWatch(self, prefix, callback)
        self._watches.append(watch)
        watch.start()
        return watch

    def close(self) -> None:
        """See `KeyValueStore.close`."""
        for watch in self._watches:
            watch.close()
        self._client.close()

    def _read_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        response = self._client.get_prefix_response(prefix)
        found = [KeyValue(kv.key.decode(), kv.value.decode(), kv.create_revision) for kv in response.kvs]
        return found, response.header.revision

    def _open_watch(self, prefix: str, revision: int, ended: threading.Event) -> Any:
        """Starts a watch stream after ``revision``; gRPC reads its requests until ``ended`` is set."""
        etcdrpc = load_etcd3().etcdrpc
        create = etcdrpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_after_prefix(prefix.encode()), start_revision=revision + 1
        )

        def requests() -> Iterator[Any]:
            yield etcdrpc.WatchRequest(create_request=create)
            ended.wait()

        return etcdrpc.WatchStub(self._client.channel).Watch(requests())


class _EtcdWatch:
    """Follows a prefix: a full read, then the stream from that revision; after any error the same again.

    etcd3's own watcher spins without pause while etcd is away, and forgets its callbacks.
    """

    def __init__(self, store: EtcdKeyValueStore, prefix: str, callback: WatchCallback) -> None:
        self._store, self._prefix, self._callback = store, prefix, callback
        self._known: dict[str, KeyValue] | None = None
        self._closed = threading.Event()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name=f"watch {prefix}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
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
        found, revision = self._store._read_prefix(self._prefix)
        now = {kv.key: kv for kv in found}
        before = self._known or {}
        changes = [KeyChange(key, None) for key in before.keys() - now.keys()]
        changes += [KeyChange(kv.key, kv) for kv in found if before.get(kv.key) != kv]
        if changes or self._known is None:
            self._callback(changes)
        self._known = now
        return revision

    def _follow(self, revision: int, ended: threading.Event) -> None:
        self._stream = self._store._open_watch(self._prefix, revision, ended)
        if self._closed.is_set():
            self._stream.cancel()
        for response in self._stream:
            if response.canceled or response.compact_revision:
                return
            changes = [self._change(event) for event in response.events]
            if changes:
                self._callback(changes)

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


def reachable(endpoint: str, timeout_s: float = 3.0) -> str | None:
    """Returns None when an etcd answers at ``endpoint``, else what went wrong."""
    store = EtcdKeyValueStore(endpoint, timeout_s)
    try:
        store.get("/gemini/")
    except StoreUnavailableError as error:
        return str(error)
    finally:
        with contextlib.suppress(Exception):
            store.close()
    return None
