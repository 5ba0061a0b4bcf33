"""A connection to a cluster of etcd members: whichever of them answers, within a bounded time."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from lightning_gemini.controlplane.kv.base import StoreUnavailableError
from lightning_gemini.controlplane.processes import PROTOBUF_VARIABLE
from lightning_gemini.errors import ConfigurationError

_T = TypeVar("_T")
_PAUSE_S = 0.05  # while the members elect a leader
_CHANNEL_OPTIONS = (
    # A peer that vanished without a word must not leave a watch waiting for ever.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Else a new channel to the same member would share the broken connection of the one before.
    ("grpc.use_local_subchannel_pool", 1),
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


def parse_endpoints(text: str) -> list[tuple[str, int]]:
    """Reads ``HOST:PORT[,HOST:PORT…]``.

    Raises:
        ConfigurationError: If it is anything else.
    """
    endpoints = []
    for endpoint in text.split(","):
        host, _, port = endpoint.strip().rpartition(":")
        if not host or not port.isdigit():
            raise ConfigurationError(f"etcd endpoints are HOST:PORT[,HOST:PORT...], got {text!r}")
        endpoints.append((host, int(port)))
    return endpoints


class EtcdConnection:
    """Speaks to one member at a time, and turns to the next when that one does not answer.

    A channel that failed once is closed, and with it everything else that runs on it, watches included: a member that
    hangs, or a link that swallows all, is left behind by all threads as soon as one of them notices.

    Args:
        endpoints: ``HOST:PORT`` of each member's client interface, comma-separated.
        timeout_s: About the longest that one `call` may take, however many members have to be tried.
    """

    def __init__(self, endpoints: str, timeout_s: float) -> None:
        self._endpoints = parse_endpoints(endpoints)
        self._timeout_s = timeout_s
        self._attempt_s = timeout_s / len(self._endpoints)
        self._lock = threading.Lock()
        self._turn = 0
        self._client: Any = None
        self._answered_at = float("-inf")
        self.closed = threading.Event()

    def client(self) -> Any:
        """Returns the etcd3 client of the member whose turn it is; connects on its first call.

        Raises:
            StoreUnavailableError: If this connection was closed.
        """
        with self._lock:
            if self.closed.is_set():
                raise StoreUnavailableError("the connection to etcd is closed")
            if self._client is None:
                host, port = self._endpoints[self._turn % len(self._endpoints)]
                self._client = load_etcd3().client(host, port, timeout=self._attempt_s, grpc_options=_CHANNEL_OPTIONS)
            return self._client

    def silent_s(self) -> float:
        """Seconds since a member last answered."""
        return time.monotonic() - self._answered_at

    def call(self, name: str, operation: Callable[[Any], _T]) -> _T:
        """Runs an operation on a member that answers.

        Args:
            name: What it is called in messages.
            operation: Called with an etcd3 client, and again with the next member's after a failure: it must tolerate
                that an attempt took effect although its answer was lost.

        Raises:
            StoreUnavailableError: If none did within the time limit, or etcd refused.
        """
        import grpc

        deadline, refusals = time.monotonic() + self._timeout_s, 0
        while True:
            client = self.client()
            try:
                result = operation(client)
                self._answered_at = time.monotonic()
                return result
            except (load_etcd3().Etcd3Exception, grpc.RpcError, ValueError) as error:
                failure, kind = error, _kind(error)
            if kind != "refused":
                self._leave(client)
            refusals = refusals + 1 if kind == "unreachable" else 0
            out_of_time = time.monotonic() + 0.8 * self._attempt_s > deadline
            if kind == "refused" or out_of_time or refusals >= len(self._endpoints):
                verb = "refused" if kind == "refused" else "did not answer"
                raise StoreUnavailableError(f"etcd {verb} {name}: {_describe(failure)}") from failure
            if kind == "leaderless":
                self.closed.wait(_PAUSE_S)

    def close(self) -> None:
        """Hangs up; idempotent."""
        with self._lock:
            self.closed.set()
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _leave(self, client: Any) -> None:
        with self._lock:
            if client is not self._client:
                return  # another thread did
            self._client = None
            self._turn += 1
        client.close()


def _cause(error: Exception) -> Any:
    """Returns the gRPC error behind an exception, or None; etcd3 hides it, with what it says, behind its own."""
    import grpc

    for each in (error, error.__context__):
        if isinstance(each, grpc.RpcError):
            return each
    return None


def _kind(error: Exception) -> str:
    """Tells failures apart by what helps: asking another member, asking later, or nothing."""
    import grpc

    cause = _cause(error)
    if cause is None:
        return "hung up"  # a closed channel: another thread gave this member up
    if cause.code() is grpc.StatusCode.UNAVAILABLE:
        return "leaderless" if str(cause.details()).startswith("etcdserver:") else "unreachable"
    status = grpc.StatusCode
    if cause.code() in (status.DEADLINE_EXCEEDED, status.CANCELLED, status.UNKNOWN, status.INTERNAL):
        return "silent"
    return "refused"


def _describe(error: Exception) -> str:
    cause = _cause(error)
    return repr(error) if cause is None else f"{cause.code().name}, {cause.details()}"
