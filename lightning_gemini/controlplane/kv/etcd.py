"""The key-value store on etcd v3, through the ``etcd3`` client."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from lightning_gemini.controlplane.kv.base import KeyValue, StoreUnavailableError, Watch, WatchCallback
from lightning_gemini.controlplane.kv.connection import EtcdConnection, load_etcd3
from lightning_gemini.controlplane.kv.etcd_watch import EtcdWatch

__all__ = ["EtcdKeyValueStore", "load_etcd3", "reachable"]

_PROBE_S = 1.0
_MAX_CONFLICTS = 20


class EtcdKeyValueStore:
    """A connection to etcd; connects on first use, again after every loss, and to another member after a failure.

    A write that got no answer may still lie in a member that hangs, and take effect when that one wakes up. So every
    write names the revision of the key that it replaces: once a later write was stored, the forgotten one is void.

    Args:
        endpoint: ``HOST:PORT`` of etcd's client interface; of each member, comma-separated.
        timeout_s: The longest that one call may take.
    """

    def __init__(self, endpoint: str, timeout_s: float = 2.0) -> None:
        self._connection = EtcdConnection(endpoint, timeout_s)
        self._revisions: dict[str, int] = {}  # of the keys written here: the last modification known
        self._watches: list[EtcdWatch] = []
        self._prober = threading.Thread(target=self._probe, name="etcd probe", daemon=True)

    def put(self, key: str, value: str, lease: int | None = None) -> None:
        """See `KeyValueStore.put`."""
        self._connection.call("put", lambda client: self._replace(client, key, value, lease))

    def put_if_absent(self, key: str, value: str, lease: int | None = None) -> int | None:
        """See `KeyValueStore.put_if_absent`."""
        attempts = 0

        def create(client: Any) -> int | None:
            nonlocal attempts
            attempts += 1
            do = client.transactions
            stored, responses = client.transaction(
                compare=[do.create(key) == 0], success=[do.put(key, value, lease=lease)], failure=[do.get(key)]
            )
            if stored:
                return int(responses[0].response_put.header.revision)
            ((found, meta),) = responses[0]
            # The answer to an attempt of this very call may have been lost. Only a lease tells whose key it is.
            mine = attempts > 1 and bool(lease) and (found, meta.lease_id) == (value.encode(), lease)
            return int(meta.create_revision) if mine else None

        return self._connection.call("put_if_absent", create)

    def put_guarded(self, key: str, value: str, guard: str, guard_revision: int) -> bool:
        """See `KeyValueStore.put_guarded`."""
        return self._connection.call(
            "put_guarded", lambda client: self._replace(client, key, value, None, guard, guard_revision)
        )

    def get(self, key: str) -> KeyValue | None:
        """See `KeyValueStore.get`."""
        value, meta = self._connection.call("get", lambda client: client.get(key))
        return None if meta is None else KeyValue(key, value.decode(), meta.create_revision)

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        """See `KeyValueStore.get_prefix`."""
        return self._read_prefix(prefix)[0]

    def delete(self, key: str) -> bool:
        """See `KeyValueStore.delete`."""

        def remove(client: Any) -> bool:
            do = client.transactions
            for _ in range(_MAX_CONFLICTS):
                _, meta = client.get(key)
                if meta is None:
                    return False
                compare = [do.mod(key) == meta.mod_revision]
                if client.transaction(compare=compare, success=[do.delete(key)], failure=[])[0]:
                    return True
            raise _contended(key)

        return self._connection.call("delete", remove)

    def grant(self, ttl_s: int) -> int:
        """See `KeyValueStore.grant`."""
        return self._connection.call("grant", lambda client: int(client.lease(ttl_s).id))

    def keep_alive(self, lease: int) -> bool:
        """See `KeyValueStore.keep_alive`."""
        return self._connection.call(
            "keep_alive", lambda client: any(answer.TTL > 0 for answer in client.refresh_lease(lease))
        )

    def revoke(self, lease: int) -> None:
        """See `KeyValueStore.revoke`."""
        self._connection.call("revoke", lambda client: _revoke(client, lease))

    def watch_prefix(self, prefix: str, callback: WatchCallback) -> Watch:
        """See `KeyValueStore.watch_prefix`."""
        watch = EtcdWatch(self._connection, self._read_prefix, prefix, callback)
        if not self._watches:
            self._prober.start()
        self._watches.append(watch)
        watch.start()
        return watch

    def close(self) -> None:
        """See `KeyValueStore.close`."""
        self._connection.close()  # first: no watch then waits for an answer
        for watch in self._watches:
            watch.close()

    def _read_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        response = self._connection.call("get_prefix", lambda client: client.get_prefix_response(prefix))
        found = [KeyValue(kv.key.decode(), kv.value.decode(), kv.create_revision) for kv in response.kvs]
        return found, response.header.revision

    def _replace(
        self, client: Any, key: str, value: str, lease: int | None, guard: str | None = None, guard_revision: int = 0
    ) -> bool:
        """Stores a value in place of the newest one; returns False, storing nothing, where the guard does not hold."""
        do = client.transactions
        for _ in range(_MAX_CONFLICTS):
            guards = [] if guard is None else [do.create(guard) == guard_revision]
            stored, responses = client.transaction(
                compare=[do.mod(key) == self._revisions.get(key, 0), *guards],
                success=[do.put(key, value, lease=lease)],
                failure=[do.get(key), do.get(guard or key)],
            )
            if stored:
                self._revisions[key] = responses[0].response_put.header.revision
                return True
            found, guarded = ([meta for _, meta in kvs] for kvs in responses)
            if guard is not None and [meta.create_revision for meta in guarded] != [guard_revision]:
                return False
            self._revisions[key] = found[0].mod_revision if found else 0
        raise _contended(key)

    def _probe(self) -> None:
        """Asks when nobody else does: a watch alone would not notice that its member hangs."""
        while not self._connection.closed.wait(_PROBE_S):
            if self._connection.silent_s() > _PROBE_S:
                with contextlib.suppress(StoreUnavailableError):
                    self.get("/gemini/")


def _revoke(client: Any, lease: int) -> None:
    import grpc

    try:
        client.revoke_lease(lease)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:  # it has ended
            raise


def _contended(key: str) -> StoreUnavailableError:
    return StoreUnavailableError(f"others changed {key} {_MAX_CONFLICTS} times in a row while it was written")


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
