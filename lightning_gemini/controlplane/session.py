"""A lease that is kept alive: what an agent holds while it lives, and loses when its machine dies."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from lightning_gemini.controlplane.kv.base import KeyValueStore, StoreUnavailableError

_log = logging.getLogger(__name__)


class Session:
    """Holds a lease on the store and renews it from a thread of its own.

    A store that is away longer than the lease ends it; the session then opens another one as soon as the store is back.

    Args:
        store: Where the lease is.
        ttl_s: Seconds of silence after which the store ends the lease.
        on_renewed: Called on the session's thread with each new lease that replaces a lost one.
    """

    def __init__(self, store: KeyValueStore, ttl_s: int, on_renewed: Callable[[int], None]) -> None:
        self._store, self._ttl_s, self._on_renewed = store, ttl_s, on_renewed
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="session", daemon=True)
        self._trouble_at: float | None = None
        self.lease = 0

    def start(self) -> None:
        """Opens the lease.

        Raises:
            StoreUnavailableError: If the store does not answer.
        """
        self.lease = self._store.grant(self._ttl_s)
        self._thread.start()

    def close(self) -> None:
        """Ends the lease, so that its keys vanish now instead of after ``ttl_s``; idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(self._ttl_s)
        if self.lease:
            with contextlib.suppress(StoreUnavailableError):
                self._store.revoke(self.lease)

    def troubled_lately(self) -> bool:
        """Says whether the lease was lost, or could not be renewed, within the last three lease times.

        Then others may have lost theirs although they live.
        """
        return self._trouble_at is not None and time.monotonic() - self._trouble_at < 3 * self._ttl_s

    def _keep_alive(self) -> None:
        answering = True
        while not self._closed.wait(self._ttl_s / 4):
            try:
                if not self._store.keep_alive(self.lease):
                    self._replace_lease()
                answering = True
            except StoreUnavailableError as error:
                self._trouble_at = time.monotonic()
                if answering:
                    _log.warning("key-value store is away, training goes on without it: %s", error)
                answering = False

    def _replace_lease(self) -> None:
        self.lease = self._store.grant(self._ttl_s)
        self._trouble_at = time.monotonic()
        _log.warning("the lease on the key-value store had ended; opened another one")
        self._on_renewed(self.lease)
