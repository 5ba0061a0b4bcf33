"""What the control plane asks of a key-value store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_gemini.errors import GeminiError

__all__ = ["KeyChange", "KeyValue", "KeyValueStore", "StoreUnavailableError", "Watch", "WatchCallback"]


class StoreUnavailableError(GeminiError, ConnectionError):
    """The key-value store did not answer in time; training goes on, and the caller tries again later."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as stored.

    Attributes:
        key: Its full name.
        value: Its text.
        create_revision: Store-wide revision at which this life of the key began; a key that is deleted and put again
            has a larger one, which makes it a fencing token.
    """

    key: str
    value: str
    create_revision: int


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A key with its new content; ``now`` is None once it is gone."""

    key: str
    now: KeyValue | None


WatchCallback = Callable[[Sequence[KeyChange]], None]


class Watch(Protocol):
    """A running watch."""

    def close(self) -> None:
        """Ends the watch; the callback is not called after this returns, unless it is running right now."""


class KeyValueStore(Protocol):
    """A linearizable store with leases.

    Every call is bounded in time and raises `StoreUnavailableError` when the store does not answer.
    """

    def put(self, key: str, value: str, lease: int | None = None) -> None:
        """Stores a value; with a lease it vanishes when the lease ends."""

    def put_if_absent(self, key: str, value: str, lease: int | None = None) -> int | None:
        """Stores a value unless the key exists; returns the key's create revision, or None where it existed."""

    def put_guarded(self, key: str, value: str, guard: str, guard_revision: int) -> bool:
        """Stores a value only while the key ``guard`` still has that create revision; returns whether it did."""

    def get(self, key: str) -> KeyValue | None:
        """Returns one key."""

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        """Returns every key that starts with ``prefix``."""

    def delete(self, key: str) -> bool:
        """Removes a key; returns whether it existed."""

    def grant(self, ttl_s: int) -> int:
        """Opens a lease and returns its id."""

    def keep_alive(self, lease: int) -> bool:
        """Renews a lease; returns False once it has ended."""

    def revoke(self, lease: int) -> None:
        """Ends a lease, and removes its keys, now."""

    def watch_prefix(self, prefix: str, callback: WatchCallback) -> Watch:
        """Reports the keys below ``prefix``: first all that exist (one call, maybe empty), then every change.

        After a lost connection the watch catches up by itself: the callback gets the differences, so the newest state
        always arrives, though not every state in between. The callback runs on the watch's thread.
        """

    def close(self) -> None:
        """Hangs up."""
